"""Encoded shards: what the frozen parts say of every clip, made once, with a fingerprint of what made it."""

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data.decode import Rejected
from data.shards import Shards, index_path, write_atomically, write_shard
from lightning_semgen.errors import UserError

PARTS = ("features", "latents")
Encode = Callable[[dict], dict[str, Tensor]]


def to_bytes(tensor: Tensor) -> bytes:
    """float16 .npy: half the bytes, and a rounding far below the noise that training adds."""
    half, buffer = tensor.half().cpu(), io.BytesIO()
    assert half.isfinite().all(), "features or latents do not fit float16"
    np.save(buffer, half.numpy())
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


def encode_shards(
    clips: Dataset, folder: Path, fingerprint: dict, encode: Encode, collate: Callable, batch_size: int, workers: int
) -> None:
    """Writes one encoded shard for each shard of a `ClipDataset` of videos that has none in `folder` yet.

    `encode` makes of a batch of that dataset its parts {"features": (B, …), "latents": (B, …)}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "fingerprint.json").exists():
        check_fingerprint(folder, fingerprint)
    else:
        write_atomically(folder / "fingerprint.json", json.dumps(fingerprint, indent=1))
    shards = clips.shards
    targets = encoded_paths(shards, folder)
    missing = [number for number, path in enumerate(targets) if not index_path(path).exists()]
    todo = {number: [i for i, row in enumerate(shards.samples) if row[0] == number] for number in missing}
    total = sum(map(len, todo.values()))
    with tqdm(total=total, desc=f"encoding into {folder}", unit="clip", disable=not todo) as progress:
        for number, indices in todo.items():
            loader = DataLoader(
                Subset(Sifted(clips), indices), batch_size, num_workers=workers, collate_fn=partial(_sift, collate)
            )
            write_shard(targets[number], _samples(loader, encode, progress))


def encoded_paths(shards: Shards, folder: Path) -> list[Path]:
    """Where the encoded shards of video shards are: named after what those hold, so that changed ones are new ones."""
    return [folder / f"{path.stem}-{digest}.tar" for path, digest in zip(shards.paths, shards.digests, strict=True)]


class Sifted(Dataset):
    """The clips, with (key, cause) in place of one that is rejected."""

    def __init__(self, clips: Dataset):
        self.clips = clips

    def __getitem__(self, index: int) -> dict | tuple[str, str]:
        try:
            return self.clips[index]
        except Rejected as cause:
            return self.clips.shards.samples[index][1], str(cause)


def _sift(collate: Callable, samples: list[dict | tuple[str, str]]) -> tuple[dict | None, list[tuple[str, str]]]:
    good = [sample for sample in samples if isinstance(sample, dict)]
    return collate(good) if good else None, [sample for sample in samples if isinstance(sample, tuple)]


def _samples(loader: DataLoader, encode: Encode, progress: tqdm) -> Iterator[dict]:
    for batch, rejected in loader:
        for key, cause in rejected:
            rank_zero_warn(f"Sample {key} is left out of the encoded shards: {cause}.")
        if batch is not None:
            parts = {f"{name}.npy": value for name, value in encode(batch).items()}
            for row, info in enumerate(batch["info"]):
                arrays = {name: to_bytes(value[row]) for name, value in parts.items()}
                yield {"__key__": batch["sample"][row], "json": info, **arrays}
        progress.update(len(rejected) + (0 if batch is None else len(batch["info"])))
