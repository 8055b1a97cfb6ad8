"""Random numbers that are a pure function of a sample's key, so that nothing depends on batch, rank or resume."""

import hashlib

import torch
from torch import Tensor

DTYPE = torch.float32  # whatever the trainer's precision


def sample_key(*parts: int | str) -> int:
    """A 63-bit key of (seed, epoch, position), or of other parts that identify a draw."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _generators(keys: Tensor, purpose: str):
    for key in keys.tolist():
        yield torch.Generator(keys.device).manual_seed(sample_key(key, purpose))


def normal(keys: Tensor, purpose: str, *shape: int) -> Tensor:
    """Standard normal numbers (B, *shape); row b depends on `keys[b]` and `purpose` alone."""
    numbers = [torch.randn(shape, generator=g, dtype=DTYPE, device=g.device) for g in _generators(keys, purpose)]
    return torch.stack(numbers)


def uniform(keys: Tensor, purpose: str) -> Tensor:
    """Numbers in [0, 1) of shape (B,); row b depends on `keys[b]` and `purpose` alone."""
    numbers = [torch.rand((), generator=g, dtype=DTYPE, device=g.device) for g in _generators(keys, purpose)]
    return torch.stack(numbers)
