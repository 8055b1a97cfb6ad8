"""What the published encoder families share: sizes, windows in time, resolution, pooling to one grid."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, inf, sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.base import FrozenEncoder, pooled_seconds
from encoders.published.checkpoint import Checkpoint
from encoders.published.loading import FileLayout, build_network
from encoders.published.resize import crop_centre, resize, scaled_to
from lightning_semgen.errors import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Spec:
    """A published model: sizes, and the pixels it was trained on.

    Attributes:
        frames, size: of the clips it was trained on; a size of None: any.
        mean, std: of the pixels, which are 0 to 1 before.
        out: D of the features, where that is not the width.
        full_attention: blocks that attend to a whole frame, where others attend in windows.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int = 16
    tubelet: int = 2
    frames: int = 16
    size: int | None = 224
    mean: tuple[float, float, float] = IMAGENET[0]
    std: tuple[float, float, float] = IMAGENET[1]
    out: int | None = None
    full_attention: tuple[int, ...] = ()

    @property
    def table(self) -> tuple[int, int, int]:
        """(T', H', W') of the clips it was trained on."""
        return self.frames // self.tubelet, self.size // self.patch, self.size // self.patch


class PublishedEncoder(FrozenEncoder):
    """An encoder with published weights; a family says how it normalises, loads and makes tokens.

    A clip goes through in passes of `window` frames, so that memory does not grow with its length; the last pass may be
    shorter. Frames beyond whole tubelets are unused, a clip of less than one tubelet is filled up with its last frame.

    Args:
        spec: sizes.
        resolution: "native" keeps any aspect ratio and rounds the sides to whole cells; "authors" resizes and crops as
            the authors do.
        min_pixels, max_pixels: smaller or larger frames are scaled to that area before their sides are rounded.
        semantic_grid: (T', H', W') to which the features are averaged; None: as they are.
        window: frames of a pass; None: as many as a clip had in training.
        dtype: of weights and activations. Pixels, rotary angles and features are float32.
        layer: after how many blocks the features are taken; None: where the authors take them.
    """

    layouts: tuple[FileLayout, ...]
    kernel: str  # that resizes, a key of `resize.KERNELS`
    alone: bool = False  # whether a step sees the frames of its tubelet only
    short_side: tuple[float, float] | None = None  # of the authors' frames to the side of their crop; None: no crop
    antialias: bool = False  # whether the authors resize with it before they crop

    def __init__(
        self,
        spec: Spec,
        resolution: Literal["native", "authors"] = "native",
        min_pixels: float = 0,
        max_pixels: float = inf,
        semantic_grid: tuple[int, int, int] | None = None,
        window: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        layer: int | None = None,
    ):
        super().__init__()
        check_choice("resolution", resolution, ("native", "authors"))
        check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
        self.spec, self.resolution, self.dtype = spec, resolution, getattr(torch, dtype)
        self.dim, self.tubelet = spec.width, spec.tubelet
        self.cell = self.multiple = spec.patch  # pixels of a token's side, and what the sides must be multiples of
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.semantic_grid = semantic_grid and tuple(semantic_grid)
        self.window = window or spec.frames
        if self.window % self.tubelet:
            raise UserError(f"window {window} must hold whole tubelets of {self.tubelet} frames.")
        if layer is not None and not 0 <= layer <= spec.depth:
            raise UserError(f"layer {layer} is not one of the encoder's: 0 (patches) to {spec.depth}.")

    def load(self, build: Callable[[], nn.Module], checkpoint: Checkpoint | None, source: str = "") -> nn.Module:
        """The network that `build` makes, with the checkpoint's weights; without one with random ones."""
        return build_network(build, checkpoint, self.layouts, self.dtype, source)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Pixels (B, T ≤ window, 3, h, w) to tokens (B, T', H', W', D)."""
        raise NotImplementedError

    # Space

    def pixel_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the pixels that frames of that size become (`smart_resize` of qwen_vl_utils, for all families)."""
        if self.resolution == "authors" and self.spec.size is not None:
            return self.spec.size, self.spec.size
        sides, unit = (height, width), self.multiple
        rounded = [max(1, round(side / unit)) * unit for side in sides]
        if (area := rounded[0] * rounded[1]) > self.max_pixels:
            shrink = sqrt(height * width / self.max_pixels)
            rounded = [max(1, floor(side / shrink / unit)) * unit for side in sides]
        elif area < self.min_pixels:
            grow = sqrt(self.min_pixels / (height * width))
            rounded = [ceil(side * grow / unit) * unit for side in sides]
        return tuple(rounded)

    def resize(self, frames: Tensor) -> Tensor:
        """Frames (…, H, W) to grey levels (…, h, w)."""
        size = self.pixel_size(*frames.shape[-2:])
        if self.resolution == "native" or self.short_side is None:
            return resize(frames, *size, self.kernel)
        longer, shorter = self.short_side
        scaled = scaled_to(*frames.shape[-2:], int(self.spec.size * longer / shorter))
        return crop_centre(resize(frames, *scaled, self.kernel, self.antialias), *size)

    def preprocess(self, frames: Tensor) -> Tensor:
        constants = torch.tensor([self.spec.mean, self.spec.std], dtype=torch.float32, device=frames.device)
        mean, std = constants[..., None, None]
        return (self.resize(frames) / 255 - mean) / std

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        if self.semantic_grid is not None:
            return self.semantic_grid
        height, width = self.pixel_size(height, width)
        return max(1, frames // self.tubelet), height // self.cell, width // self.cell

    # Time

    @property
    def block(self) -> int | None:
        if self.semantic_grid is not None:
            return None
        return self.tubelet if self.alone else self.window

    def seconds(self, times: Tensor) -> Tensor:
        seconds = super().seconds(times) if len(times) >= self.tubelet else times[-1:]
        return seconds if self.semantic_grid is None else pooled_seconds(seconds, self.semantic_grid[0])

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, T, 3, H, W) to features (B, T', H', W', D)."""
        return self._in_passes(frames, lambda window: self.tokens(self.preprocess(window)))

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        return self._in_passes(pixels, self.tokens)

    def _in_passes(self, clip: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        if clip.shape[1] < self.tubelet:
            clip = torch.cat([clip, clip[:, -1:].expand(-1, self.tubelet - clip.shape[1], -1, -1, -1)], dim=1)
        windows = clip[:, : clip.shape[1] // self.tubelet * self.tubelet].split(self.window, dim=1)
        with torch.autocast(clip.device.type, enabled=False):  # `dtype` alone says it, in `fit` and `encode` alike
            features = torch.cat([encode(window).float() for window in windows], dim=1)
        if self.semantic_grid is None:
            return features
        return F.adaptive_avg_pool3d(features.movedim(-1, 1), self.semantic_grid).movedim(1, -1)


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"The encoder's {option} is {value!r}: it must be one of {', '.join(choices)}.")
