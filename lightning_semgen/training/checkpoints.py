"""Checkpoints: a file or, where each rank saved its share, a folder of torch.distributed.checkpoint."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from lightning_semgen.errors import UserError

FACTS = "meta.pt"  # of a folder: what Lightning puts beside weights and optimiser
METADATA = ".metadata"  # of a folder: where each tensor is, a pickle
_CLASSES = {  # by module: all that torch itself puts into that pickle
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its name in Python 3.13
    "torch": {"Size", "device"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


def is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path / FACTS).is_file()


def consolidated(folder: Path, parts: set[str] | None = None) -> dict[str, Any]:
    """A checkpoint that is a folder, as if it had been one file."""
    check_harmless(folder)
    found: dict[str, Any] = {}
    names = parts and parts | {"model" + part.removeprefix("state_dict") for part in parts}  # as under fsdp
    planner = _EmptyStateDictLoadPlanner(keys=names)
    _load_state_dict(found, FileSystemReader(folder), planner=planner, no_dist=True)
    found["state_dict"] = found.pop("state_dict", None) or found.pop("model", {})
    optimizers = [found.pop(name) for name in sorted(found) if name.startswith("optimizer_")]
    return checkpoint_facts(folder) | found | ({"optimizer_states": optimizers} if optimizers else {})


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside weights and optimiser; those of a file come as tensors without content."""
    if path.is_dir():
        return torch.load(path / FACTS, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="meta", weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of torch's metadata alone, so that no other code runs."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")
        return super().find_class(module, name)


def check_harmless(path: Path) -> None:
    """UserError where reading a checkpoint would execute what somebody has put there.

    torch and Lightning unpickle three things without a restriction: a folder's metadata, its items that are not
    tensors, and under fsdp a file.
    """
    try:
        if path.is_dir():
            _check_folder(path)
        else:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"The checkpoint {path} is not opened, for it is damaged or harmful: {reason[0]}.") from error


def _check_folder(folder: Path) -> None:
    others = [path.name for path in folder.glob(f"*{METADATA}") if path.name != METADATA]
    if others:  # torch would turn to those where it fails to read the one
        raise ValueError(f"it holds {others[0]}, which is not read")
    with (folder / METADATA).open("rb") as file:
        metadata = _MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{METADATA} holds something else")
    for index, place in metadata.storage_data.items():
        if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
            raise ValueError(f"{index.fqn} is outside of it or packed")
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            with (folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                torch.load(io.BytesIO(file.read(place.length)), weights_only=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is whole or not there: written beside its place, then renamed. Folders are read too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, unfinished_path(path), storage_options)
        put_in_place(path)

    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict[str, Any]:
        if Path(path).is_dir():
            return consolidated(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def unfinished_path(path: str | Path) -> Path:
    """Where the checkpoint of that path is written to."""
    return Path(path).with_name(Path(path).name + ".partial")


def put_in_place(path: str | Path) -> None:
    """Puts what was written in its place; where a folder comes or goes, what was there is first moved aside."""
    path = Path(path)
    if unfinished_path(path).is_file() and not path.is_dir():
        unfinished_path(path).replace(path)
        return
    before = path.with_name(path.name + ".before")
    delete(before)
    if path.exists():
        path.rename(before)
    unfinished_path(path).rename(path)
    delete(before)


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
