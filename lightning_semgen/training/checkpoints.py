"""Checkpoints: a file or, where each rank saved its share, a folder of torch.distributed.checkpoint."""

import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.tensor import DTensor

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
    """Whether a checkpoint is there; one that a crash has left beside its place is first put back."""
    put_back(path)
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
        unfinished = unfinished_path(path)
        with one_sentence_when_full(path):
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            delete(unfinished)
            with unfinished.open("wb") as file:  # Lightning would stage all of it in the system's temporary folder
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        put_in_place(path)

    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict[str, Any]:
        if Path(path).is_dir():
            return consolidated(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


@torch.no_grad()
def check_finite(stage: LightningModule) -> None:
    """UserError, on all ranks, where a weight or its average is not finite on one: the checkpoint before is better."""
    tensors = [*stage.parameters(), *stage.buffers()]
    mine = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    finite = all(tensor.isfinite().all() for tensor in mine)
    if not stage.trainer.strategy.reduce_boolean_decision(finite):
        raise UserError(
            f"Weights were not finite at step {stage.trainer.global_step} and are not saved: lower model.lr or set"
            " trainer.gradient_clip_val, and go on from the last checkpoint with --ckpt_path last."
        )


@contextmanager
def one_sentence_when_full(path: str | Path, deletes: bool = True) -> Iterator[None]:
    """UserError where the disk does not take a checkpoint, whose unfinished part is deleted by one of the ranks."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if (reason := _disk_error(error)) is None:
            raise
        if deletes:
            delete(unfinished_path(path))
        kept = f"the one before is kept in {path}" if Path(path).exists() else "there is none before it"
        raise UserError(
            f"A checkpoint could not be written to {Path(path).parent} ({reason}): {kept}. Make room and go on with"
            " --ckpt_path last."
        ) from error


def _disk_error(error: BaseException) -> str | None:
    """What the system said of a write that failed; torch says something of its own, in which that may be lost."""
    if isinstance(error, CheckpointException):  # of all ranks
        return next(filter(None, (_disk_error(failure) for failure, _ in error.failures.values())), None)
    said = str(error)
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    if error is not None:
        return error.strerror or str(error)
    return "the disk is full" if re.search("inline_container|StreamWriter|iostream", said) else None


def unfinished_path(path: str | Path) -> Path:
    """Where the checkpoint of that path is written to."""
    return Path(path).with_name(Path(path).name + ".partial")


def before_path(path: str | Path) -> Path:
    """Where the checkpoint of that path is while another takes its place."""
    return Path(path).with_name(Path(path).name + ".before")


def put_in_place(path: str | Path) -> None:
    """Puts what was written in its place; where a folder comes or goes, what was there is first moved aside."""
    path, unfinished, before = Path(path), unfinished_path(path), before_path(path)
    try:
        if path.is_dir() or not unfinished.is_file():
            delete(before)
            if path.exists():
                path.rename(before)
        unfinished.replace(path)
    except FileNotFoundError:  # another command has found nothing there and put it back
        put_back(path)
        if not path.exists():
            raise
    delete(before)


def put_back(path: Path) -> None:
    """Where a crash between two renamings has left no checkpoint in its place, the newest whole one is put there."""
    unfinished, before = unfinished_path(path), before_path(path)
    for left in (unfinished, before):
        if not path.exists() and _is_whole(left):
            with suppress(OSError):  # another rank was faster, or the run is somebody else's
                left.rename(path)
                delete(before)


def _is_whole(path: Path) -> bool:
    """Whether all of a checkpoint has been written: an archive's end, and a folder's facts, are written last."""
    if path.is_dir():
        return (path / METADATA).is_file() and zipfile.is_zipfile(path / FACTS)
    return zipfile.is_zipfile(path)


def delete(path: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
