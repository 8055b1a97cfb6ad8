"""A generated video, decoded as it is watched: at no time is more than a chunk of it in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from data.codec.mp4 import write_mp4
from encoders.vae.base import FrozenVAE
from lightning_semgen.video.pictures import evenly_spaced

PREVIEW_FRAMES = 128  # frames, at most, that are kept of what was watched


class LatentVideo:
    """The video of latents (C, T_z, H_z, W_z); iterated over, its frames in order as chunks, uint8 (t, 3, H, W)."""

    def __init__(self, latents: Tensor, vae: FrozenVAE):
        self.latents, self.vae = latents, vae
        self._preview: Tensor | None = None

    def __len__(self) -> int:
        """T, its frames."""
        return 1 + (self.latents.shape[1] - 1) * self.vae.time_stride

    def __iter__(self) -> Iterator[Tensor]:
        kept, start, wanted = [], 0, evenly_spaced(len(self), min(len(self), PREVIEW_FRAMES))
        for (chunk,) in self.vae.decode_chunks(self.latents[None]):
            inside = wanted[(wanted >= start) & (wanted < start + len(chunk))]
            kept.append(chunk[(inside - start).to(chunk.device)].cpu())
            start += len(chunk)
            yield chunk
        self._preview = torch.cat(kept)

    @property
    def preview(self) -> Tensor:
        """At most 128 evenly spaced frames (t, 3, H, W) on the CPU.

        They are kept when the video is watched to its end, which is done here if it has not been yet.
        """
        if self._preview is None:
            for _ in self:
                pass
        return self._preview


def previews(videos: list[LatentVideo]) -> Tensor:
    """(B, t, 3, H, W)."""
    return torch.stack([video.preview for video in videos])


@dataclass(frozen=True)
class GeneratedVideo:
    """A video and what it was generated from."""

    video: LatentVideo
    fps: float
    prompt: str
    seed: int

    @cached_property
    def frames(self) -> Tensor:
        """uint8 (T, 3, H, W) on the CPU."""
        return torch.cat([chunk.cpu() for chunk in self.video])

    def save(self, path: str | Path) -> None:
        """Writes an mp4 that carries prompt and seed, chunk by chunk as the video is decoded."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        metadata = {"title": self.prompt, "comment": f"seed={self.seed}"}
        write_mp4(self.video, path, self.fps, metadata, growing=True)
