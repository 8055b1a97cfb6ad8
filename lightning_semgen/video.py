"""A generated video, decoded as it is watched: at no time is more than a chunk of it in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from encoders.vae import FrozenVAE
from lightning_semgen.pictures import evenly_spaced

GLIMPSES = 128  # frames, at most, that are kept of what was watched


class Video:
    """The video of latents (C, T_z, H_z, W_z); iterated over, its frames in order as chunks, uint8 (t, 3, H, W)."""

    def __init__(self, latents: Tensor, vae: FrozenVAE):
        self.latents, self.vae = latents, vae
        self._glimpses: Tensor | None = None

    def __len__(self) -> int:
        """T, its frames."""
        return 1 + (self.latents.shape[1] - 1) * self.vae.time_stride

    def __iter__(self) -> Iterator[Tensor]:
        kept, start, wanted = [], 0, evenly_spaced(len(self), min(len(self), GLIMPSES))
        for (chunk,) in self.vae.decode_chunks(self.latents[None]):
            inside = wanted[(wanted >= start) & (wanted < start + len(chunk))]
            kept.append(chunk[(inside - start).to(chunk.device)].cpu())
            start += len(chunk)
            yield chunk
        self._glimpses = torch.cat(kept)

    @property
    def glimpses(self) -> Tensor:
        """Its frames or, of more than 128, that many evenly spaced ones, (t, 3, H, W) on the CPU.

        They are kept when the video is watched to its end, which is done here if it has not been yet.
        """
        if self._glimpses is None:
            for _ in self:
                pass
        return self._glimpses


def glimpses(videos: list[Video]) -> Tensor:
    """(B, t, 3, H, W)."""
    return torch.stack([video.glimpses for video in videos])
