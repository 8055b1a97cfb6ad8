"""Encoded shards: what the frozen parts say of every clip, made once, with a fingerprint of what made it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data.shards import index_path, write_atomically, write_shard
from lightning_semgen.errors import UserError

PARTS = ("features", "latents")
Encode = Callable[[dict], dict[str, Tensor]]


def to_bytes(tensor: Tensor) -> bytes:
    """float16 .npy: half the bytes, and a rounding far below the noise that training adds."""
    buffer = io.BytesIO()
    np.save(buffer, tensor.half().cpu().numpy())
    return buffer.getvalue()


def from_bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False)).float()


def check_fingerprint(folder: Path, fingerprint: dict) -> None:
    """UserError that names both values where the shards in `folder` were made by other parts or for another clip."""
    path = folder / "fingerprint.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, value in json.loads(json.dumps(fingerprint)).items():
        if found.get(name) != value:
            raise UserError(
                f"The encoded shards in {folder} were made with {name} {found.get(name)!r}, the config says {value!r}:"
                " delete that folder to have them made again, or set data.encoded to another one."
            )


def encode_shards(dataset, folder: Path, fingerprint: dict, encode: Encode, batch_size: int, **loader) -> None:
    """Writes one encoded shard for each shard of `dataset` that has none in `folder` yet.

    Args:
        dataset: a `ClipDataset` of video shards.
        encode: a batch of that dataset to the parts {"features": (B, …), "latents": (B, …)}.
        loader: further arguments of the DataLoader.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "fingerprint.json").exists():
        check_fingerprint(folder, fingerprint)
    else:
        write_atomically(folder / "fingerprint.json", json.dumps(fingerprint, indent=1))
    missing = [n for n, path in enumerate(dataset.shards.paths) if not index_path(folder / path.name).exists()]
    todo = [[i for i, row in enumerate(dataset.shards.samples) if row[0] == number] for number in missing]
    with tqdm(total=sum(map(len, todo)), desc=f"encoding into {folder}", unit="clip", disable=not missing) as progress:
        for number, indices in zip(missing, todo, strict=True):
            batches = DataLoader(Subset(dataset, indices), batch_size, **loader)
            write_shard(folder / dataset.shards.paths[number].name, _samples(batches, encode, progress))


def _samples(batches: DataLoader, encode: Encode, progress: tqdm):
    for batch in batches:
        parts = {f"{name}.npy": value for name, value in encode(batch).items()}
        for row, info in enumerate(batch["info"]):
            arrays = {name: to_bytes(value[row]) for name, value in parts.items()}
            yield {"__key__": batch["sample"][row], "json": json.dumps(info).encode(), **arrays}
        progress.update(len(batch["info"]))
