"""Published weights: found, opened without executing anything, read tensor by tensor."""

import argparse
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_semgen.errors import UserError

INDEX = "model.safetensors.index.json"  # of transformers
WHOLE = (INDEX, "model.safetensors", f"diffusion_pytorch_{INDEX}", "diffusion_pytorch_model.safetensors")
SUFFIXES = (".safetensors", ".pth", ".pt", ".npz")


class MissingWeights(UserError):
    """Weights that have to be fetched first; says how."""


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for.

    Attributes:
        path: the file, or the index of several.
        files: name to the .safetensors, .pt, .pth or .npz file that holds that tensor.
        origin: what `hf download` fetches more files from: a hub id, and the folder in it.
    """

    def __init__(self, path: Path, origin: tuple[str, str] = ("HUB_ID", "")):
        self.path, self.origin, self._open = path, origin, {}
        with refusals(path):
            if path.name.endswith(INDEX):
                shards = json.loads(path.read_text())["weight_map"]
                self.files = {name: path.parent / shard for name, shard in shards.items()}
            else:
                self.files = dict.fromkeys(self._tensors(path), path)

    def __getitem__(self, name: str) -> Tensor:
        with refusals(self.files[name]):
            return self._tensors(self.files[name])[name]

    def __contains__(self, name: str) -> bool:
        return name in self.files  # without reading it

    def __iter__(self):
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def json(self, name: str) -> dict:
        """A JSON file beside the weights; {} where there is none."""
        path = self.path.parent / name
        return json.loads(path.read_text()) if path.is_file() else {}

    def require(self, prefix: str) -> None:
        """UserError with the command that fetches what is missing of the files with that prefix's tensors."""
        shards = {path for name, path in self.files.items() if name.startswith(prefix)}
        hub_id, folder = self.origin
        missing = " ".join(sorted(f"{folder}{path.name}" for path in shards if not path.is_file()))
        if missing:
            total = self.json(self.path.name)["metadata"]["total_size"] / len(set(self.files.values()))
            raise MissingWeights(
                f"{self.path} names files that are not there: fetch them with `hf download {hub_id} {missing}`"
                f" (about {total * len(missing.split()) / 1e9:.1f} GB)."
            )

    def _tensors(self, path: Path) -> Mapping[str, Tensor]:
        if path not in self._open:
            self._open[path] = OPENERS[path.suffix](path)
        return self._open[path]


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the libraries say of a file that they cannot or must not read, in one sentence."""
    try:
        yield
    except (SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} cannot be read ({reason}): it is not whole, or holds pickled objects, which are not executed."
        ) from error


class _Safetensors(Mapping[str, Tensor]):
    def __init__(self, path: Path):
        self.file = safe_open(path, "pt")
        self.names = list(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Arrays(_Safetensors):
    def __init__(self, path: Path):
        self.file = np.load(path, allow_pickle=False)  # reads an array when it is asked for
        self.names = self.file.files

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.file[name])


def _torch_file(path: Path) -> dict[str, Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):  # which trainers leave beside the weights
        mmap = zipfile.is_zipfile(path)  # not so the format of before torch 1.6
        return _flatten(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


def _flatten(nested: dict, prefix: str = "") -> dict[str, Tensor]:
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
    return flat


OPENERS = {".safetensors": _Safetensors, ".npz": _Arrays, ".pt": _torch_file, ".pth": _torch_file}


def open_checkpoint(
    weights: str, file: str | None = None, download: str | None = None, subfolder: str | None = None
) -> Checkpoint:
    """The weights at a path, or of a hub id in the local cache; nothing is downloaded.

    Args:
        weights: a file, a folder or a hub id.
        file: which of a folder's files; None: the only one, or the index of several.
        download: the command that fetches them, and their size, for the error.
        subfolder: where a pipeline of diffusers keeps them; they may lie in the folder itself.
    """
    path, hub_id, folder = Path(weights), "HUB_ID", ""
    include = f" --include '{subfolder}/*'" if subfolder else ""
    command = download or f"`hf download {weights}{include}`"
    if not path.exists():
        if download is None and (weights.count("/") != 1 or weights.endswith(SUFFIXES)):
            raise UserError(f"There are no weights at {weights}: that is neither a file or folder nor a hub id.")
        path, hub_id = _cached(weights, command), weights
    if subfolder and (path / subfolder).is_dir() and not (path / "config.json").is_file():
        path, folder = path / subfolder, f"{subfolder}/"
    if path.is_dir():
        path = _file_in(path, file, command)
    if not path.name.endswith(INDEX) and path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no weights file: its name must end in {', '.join(SUFFIXES)}.")
    return Checkpoint(path, (hub_id, folder))


def _cached(hub_id: str, download: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise MissingWeights(
            f"The weights {hub_id} are not here: fetch them with {download}, or give the folder or file that has them"
            " as `weights`."
        ) from error


def _file_in(folder: Path, file: str | None, download: str) -> Path:
    if file is not None and (folder / file).is_file():
        return folder / file
    for name in WHOLE:
        if (folder / name).is_file():
            return folder / name
    found = next(filter(None, (sorted(folder.glob(f"*{suffix}")) for suffix in SUFFIXES)), [])
    if not found:
        raise MissingWeights(f"There are no weights in {folder} ({', '.join(SUFFIXES)}): fetch them with {download}.")
    if len(found) > 1:
        raise UserError(f"{folder} has several weights files, {', '.join(p.name for p in found)}: give one of them.")
    return found[0]
