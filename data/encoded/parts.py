"""How what is encoded of a clip is cut from what is encoded of a longer one; `cuts` says which parts can be."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """How latents or features of a clip are cut from those of a longer video.

    Clips may begin at several starts. The first `own` steps of a clip depend on its start (a causal VAE's first latent
    sees one frame): they are stored for each start. The steps after them do not: they are stored once, in pieces of
    `stride` steps. Example: a clip of 13 latents, starts 15 latents apart, own 4. The clip at start 1 is the 4 own
    latents of start 1, then steps 19 to 27 of the video, from piece 1 (steps 15 to 29).

    Attributes:
        axis: axis of time in the tensor of one sample.
        steps: steps of a clip.
        stride: steps from one start to the next.
        own: steps at a clip's beginning that are stored for each start; `steps`: all of them.
        frames: frames of the clip that the own steps depend on; None: all.
    """

    axis: int
    steps: int
    stride: int
    own: int
    frames: int | None = None

    @classmethod
    def of(cls, axis: int, steps: int, stride: int, own: int, frames: int | None = None) -> "Part":
        """A part; all its steps are own steps if that takes less space."""
        return cls(axis, steps, stride, own, frames) if own + stride < steps else cls(axis, steps, stride, steps)

    @property
    def is_cut(self) -> bool:
        return self.own < self.steps

    def own_name(self, start: int) -> str:
        return f"start{start}.npy"

    def piece_names(self, start: int) -> list[str]:
        """Pieces of `stride` steps that hold what follows the own steps of a clip."""
        first = start * self.stride
        return [f"{n}.npy" for n in range((first + self.own) // self.stride, -(-(first + self.steps) // self.stride))]

    def names(self, start: int) -> list[str]:
        """The names of the tensors that a clip is cut from, in order."""
        own = [self.own_name(start)] if self.own else []
        return own + (self.piece_names(start) if self.is_cut else [])

    def cut(self, tensors: list[Tensor]) -> Tensor:
        """The clip, from the tensors that `names` lists."""
        if not self.is_cut:
            return tensors[0]
        own, pieces = ([tensors[0]], tensors[1:]) if self.own else ([], tensors)
        rest = torch.cat(pieces, self.axis).narrow(self.axis, self.own % self.stride, self.steps - self.own)
        return torch.cat([*own, rest], self.axis)
