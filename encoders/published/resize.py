"""Frames resized as image libraries do it: by separable kernels, to whole grey levels."""

from functools import lru_cache

import torch
from torch import Tensor


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:  # a = -1/2
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far) * (x < 2)


def _lanczos(x: Tensor) -> Tensor:
    return torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)


KERNELS = {"bilinear": _triangle, "bicubic": _cubic, "lanczos": _lanczos}


def resize(frames: Tensor, height: int, width: int, kernel: str, antialias: bool = True) -> Tensor:
    """Frames (…, H, W) of grey levels to float32 (…, height, width), whole numbers from 0 to 255.

    With `antialias` as PIL and torchvision: the kernel widens when shrinking, and each pass rounds; without as OpenCV.
    """
    frames = frames.float()
    if frames.shape[-1] != width:
        frames = frames @ _matrix(frames.shape[-1], width, kernel, antialias).to(frames.device).T
        frames = frames.round().clamp(0, 255) if antialias else frames
    if frames.shape[-2] != height:
        frames = _matrix(frames.shape[-2], height, kernel, antialias).to(frames.device) @ frames
    return frames.round().clamp(0, 255)


def crop_centre(frames: Tensor, height: int, width: int) -> Tensor:
    """The centre (…, height, width) of (…, H, W); an odd margin is halved to the even number, as Python rounds."""
    top, left = round((frames.shape[-2] - height) / 2), round((frames.shape[-1] - width) / 2)
    return frames[..., top : top + height, left : left + width]


def scaled_to(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) scaled so that the shorter is `side`, the longer rounded down."""
    return (int(side * height / width), side) if width < height else (side, int(side * width / height))


@lru_cache(maxsize=64)
def _matrix(old: int, new: int, kernel: str, antialias: bool) -> Tensor:
    """(new, old): the weight of each old pixel in each new one."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64, device="cpu") + 0.5) * scale - 0.5
    if not antialias:
        centres = centres.clamp(0, old - 1)  # the edge goes on beyond the frame
    distance = torch.arange(old, dtype=torch.float64, device="cpu") - centres[:, None]
    weights = KERNELS[kernel](distance / (max(scale, 1.0) if antialias else 1.0))
    return (weights / weights.sum(1, keepdim=True)).float()
