"""The dual-rate clip: which frames of a video go to the VAE, and which of those to the semantic encoder."""

from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import torch
from torch import Tensor

LATENT, TUBELET = 4, 2  # frames of the coarsest latents and tubelets there are, each at its own rate


@dataclass(frozen=True)
class Clip:
    """A clip of `num_frames` frames at `fps`, and the semantic stream within it at about `semantic_fps`."""

    num_frames: int
    height: int
    width: int
    fps: float
    semantic_fps: float

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the last."""
        return (self.num_frames - 1) / self.fps

    @property
    def times(self) -> Tensor:
        """(T,) seconds of the frames, float64."""
        return torch.arange(self.num_frames, dtype=torch.float64, device="cpu") / self.fps

    @property
    def semantic_indices(self) -> list[int]:
        """Indices of frames nearest to 0, 1/semantic_fps, 2/semantic_fps, … s. Encoders drop an incomplete tubelet."""
        steps = int(self.duration * self.semantic_fps + 1e-6) + 2
        nearest = [int(step * self.fps / self.semantic_fps + 0.5) for step in range(steps)]
        return [index for index in nearest if index < self.num_frames]

    @property
    def semantic_times(self) -> Tensor:
        """(T_s,) seconds of the frames of the semantic stream."""
        return self.times[self.semantic_indices]

    @property
    def period(self) -> int:
        """Frames from one start to the next: at each, a latent and a tubelet of the semantic stream begin together."""
        tubelet = TUBELET * Fraction(str(self.fps)) / Fraction(str(self.semantic_fps))
        return lcm(tubelet.numerator, LATENT)

    @property
    def semantic_period(self) -> int:
        """Frames of the semantic stream in `period`."""
        return round(self.period * self.semantic_fps / self.fps)
