"""TAEF2, the tiny image autoencoder of FLUX.2's latents (madebyollin/taesd), frame by frame."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from encoders.base import on_meta
from encoders.published.checkpoint import MissingWeights, open_checkpoint
from encoders.published.loading import FileLayout, load_strictly

CHANNELS, WIDTH = 32, 64
PASS = 16  # frames at once: the widest activations are 64 channels at full resolution
LAYOUT = FileLayout("", lambda name, file: file[name], ignorable=r"(?!)")


def conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class Block(nn.Module):
    """Three convolutions and a skip; with `pool` a bottleneck with statistics of the whole frame before them."""

    def __init__(self, pool: bool = False):
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))
        self.pool = None
        if pool:
            wide = 4 * WIDTH
            squeeze, expand = nn.Conv2d(WIDTH, wide, 1, bias=False), nn.Conv2d(wide, WIDTH, 1, bias=False)
            self.pool = nn.Sequential(squeeze, nn.GroupNorm(4, wide), nn.ReLU(), expand)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return (self.conv(x) + x).relu()


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x / 3).tanh()


def down(pool: bool = False) -> list[nn.Module]:
    return [conv(WIDTH, WIDTH, stride=2, bias=False), *(Block(pool) for _ in range(3))]


def up(blocks: int) -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False), *(Block() for _ in range(blocks))]


class TAEF2(nn.Module):
    """Video (B, 3, T, H, W) in −1 to 1 and latents (B, 32, T, H/8, W/8); no frame knows of another."""

    chunk, reach = PASS, 0
    config = SimpleNamespace(
        z_dim=CHANNELS, scale_factor_temporal=1, scale_factor_spatial=8,
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(conv(3, WIDTH), Block(), *down(), *down(), *down(pool=True), conv(WIDTH, CHANNELS))
        middle = [Block(pool=True) for _ in range(3)]
        self.decoder = nn.Sequential(
            SoftClamp(), conv(CHANNELS, WIDTH), nn.ReLU(), *middle, *up(3), *up(3), *up(1), conv(WIDTH, 3)
        )

    @classmethod
    def from_pretrained(cls, weights: str | None) -> "TAEF2":
        """From a folder with the published taef2_encoder.pth and taef2_decoder.pth; UserError where they are not."""
        model = cls()
        for name, part in () if on_meta() else model.named_children():
            path = Path(weights or ".") / f"taef2_{name}.pth"
            if not path.is_file():
                raise MissingWeights(
                    f"There is no {path}: fetch taef2_encoder.pth and taef2_decoder.pth (2.7 MB each, MIT) from the"
                    " repository madebyollin/taesd on GitHub, and name their folder as model.vae_weights."
                )
            load_strictly(part, open_checkpoint(str(path)), LAYOUT, "", torch.float32)
        return model

    def encode_chunk(self, video: Tensor, past: None) -> tuple[Tensor, None]:
        return by_frame(self.encoder, (video + 1) / 2), None

    def decode_chunk(self, latents: Tensor, past: None) -> tuple[Tensor, None]:
        return by_frame(self.decoder, latents) * 2 - 1, None


def by_frame(network: nn.Module, video: Tensor) -> Tensor:
    """(B, C, T, H, W) to (B, C', T, H', W')."""
    frames = video.transpose(1, 2)
    passes = [network(part) for part in frames.flatten(0, 1).split(PASS)]
    return torch.cat(passes).unflatten(0, frames.shape[:2]).transpose(1, 2)
