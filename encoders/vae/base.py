"""Frozen video VAEs behind one interface, diffusers' own, and the VAE as a semantic encoder (the paper's baseline)."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from encoders.base import Frozen, FrozenEncoder, pooled_seconds
from encoders.vae.taef2 import TAEF2
from encoders.vae.toy import ToyVideoVAE
from encoders.vae.wan import WanVAE
from lightning_semgen.errors import UserError

TOY = Path(__file__).parents[1] / "weights/toy_vae"


def load_toy(weights: str | None) -> ToyVideoVAE:
    """From a folder; the embedded one without."""
    if weights is not None and not Path(weights).is_dir():
        raise UserError(f"There is no folder {weights}, from which the VAE toy is to be loaded.")
    with torch.device("cpu"):  # also where the rest of a stage is built on meta
        return ToyVideoVAE.from_pretrained(weights or TOY, torch_dtype=torch.float32, low_cpu_mem_usage=False)


VAES = {"toy": load_toy, "taef2": TAEF2.from_pretrained, "wan": WanVAE.load}  # each from weights, or its own


class FrozenVAE(Frozen):
    """Frames to normalised latents and back, in chunks of time; the first latent is one frame.

    The model has the config of diffusers' video VAEs and goes from chunk to chunk: `encode_chunk(video, past)` and
    `decode_chunk(latents, past)` give what becomes of a chunk (B, C, T, H, W) and the past of the next one, which is
    None at first; `chunk` is how many latents one has, `reach` how many latents back one looks.

    Attributes:
        channels: C of the latents.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, config = model, model.config
        self.channels = config.z_dim
        self.time_stride, self.space_stride = config.scale_factor_temporal, config.scale_factor_spatial
        for name, values in (("mean", config.latents_mean), ("std", config.latents_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1, 1), persistent=False)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T_z, H_z, W_z); UserError where the VAE has no whole latents for that clip."""
        if (frames - 1) % self.time_stride or height % self.space_stride or width % self.space_stride:
            raise UserError(
                f"The VAE cannot encode {frames} frames of {height}×{width}: it needs {self.time_stride}·k + 1 frames"
                f" and sides that are multiples of {self.space_stride}; change data.num_frames, height or width."
            )
        return 1 + (frames - 1) // self.time_stride, height // self.space_stride, width // self.space_stride

    @property
    def reach(self) -> int:
        """How many latents back the frames lie that a latent depends on."""
        return self.model.reach

    def seconds(self, times: Tensor) -> Tensor:
        """Frame times (T,) to latent times (T_z,): the first latent sees one frame, each next `time_stride` more."""
        return times[:: self.time_stride]

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, T, 3, H, W) to latents (B, C, T_z, H_z, W_z) of about unit variance."""
        past, latents, step = None, [], self.time_stride * self.model.chunk
        for start in range(1 - self.time_stride, frames.shape[1], step):  # one frame in place of the first stride
            chunk = frames[:, max(start, 0) : start + step]
            video = chunk.to(self.mean.dtype).transpose(1, 2).div_(127.5).sub_(1)
            with self._own_precision():
                made, past = self.model.encode_chunk(video, past)
            latents.append((made - self.mean) / self.std)
        return torch.cat(latents, dim=2)

    @torch.no_grad()
    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Latents (B, C, T_z, H_z, W_z) to uint8 frames (B, t, 3, H, W), one chunk of T after another."""
        past = None
        for chunk in latents.split(self.model.chunk, dim=2):
            with self._own_precision():
                video, past = self.model.decode_chunk(chunk * self.std + self.mean, past)
            yield ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, T_z, H_z, W_z) to uint8 frames (B, T, 3, H, W)."""
        return torch.cat(list(self.decode_chunks(latents)), dim=1)

    def _own_precision(self) -> torch.autocast:
        return torch.autocast(self.mean.device.type, enabled=False)  # the trainer's would move the latents


def build_vae(name: str, weights: str | None = None) -> FrozenVAE:
    """The VAE of that name, frozen, from those weights or its own; an unknown one is a UserError."""
    if name not in VAES:
        raise UserError(f"There is no VAE {name!r}; known VAEs: {', '.join(VAES)}.")
    return FrozenVAE(VAES[name](weights)).freeze()


class VAEEncoder(FrozenEncoder):
    """VAE latents of the video stream, area-pooled to `semantic_grid` (T', H', W'), as features."""

    stream = "video"

    def __init__(self, weights: str | None = None, vae: str = "toy", semantic_grid: tuple[int, int, int] = (2, 3, 3)):
        super().__init__()
        self.vae, self.semantic_grid = build_vae(vae, weights), tuple(semantic_grid)
        self.dim, self.tubelet = self.vae.channels, 1

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        self.vae.grid(frames, height, width)
        return self.semantic_grid

    def seconds(self, times: Tensor) -> Tensor:
        return pooled_seconds(self.vae.seconds(times), self.semantic_grid[0])

    def preprocess(self, frames: Tensor) -> Tensor:
        return frames

    def features(self, pixels: Tensor) -> Tensor:
        return rearrange(F.adaptive_avg_pool3d(self.vae.encode(pixels), self.semantic_grid), "b c t h w -> b t h w c")
