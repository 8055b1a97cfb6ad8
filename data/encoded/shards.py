"""Encoded shards: what frozen parts say of every clip, with a fingerprint of what made it."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.rejected import Rejected
from data.shards.reader import Shards
from lightning_semgen.errors import UserError

PARTS = ("features", "moments", "latents", "text")


def to_bytes(tensor: Tensor) -> bytes:
    """A float16 .npy: half the bytes; the rounding is far below the noise that training adds."""
    half, buffer = tensor.half().cpu(), io.BytesIO()
    assert half.isfinite().all(), "what is encoded does not fit float16"
    np.save(buffer, half.numpy())
    return buffer.getvalue()


def from_bytes(data: bytes) -> Tensor:
    """The float32 tensor of a .npy; raises `Rejected` for anything else, such as a pickle."""
    try:
        return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False)).float()
    except (ValueError, EOFError, TypeError) as error:
        raise Rejected("a part that is no .npy of numbers") from error


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


def encoded_paths(shards: Shards, folder: Path) -> list[Path]:
    """Paths of the encoded shards. Names hold a digest of the video shard, so a changed shard is a new one."""
    return [folder / f"{path.stem}-{digest}.tar" for path, digest in zip(shards.paths, shards.digests, strict=True)]
