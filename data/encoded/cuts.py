"""Random clip starts on encoded shards: clips are cut from what the frozen parts say of a stretch of a video.

A stretch's starts are `Clip.period` frames apart (2.5 s at 24 and 1.6 fps), where whole latents and whole tubelets of
the semantic stream begin together. What is cut is what the clip alone would be encoded to, but for rounding to float16:

- A causal VAE's first latent has seen one frame, and those after it nothing before that; in the middle of a stretch
  they have seen the past. So the first `reach` + 1 latents are encoded anew from each start (the toy VAE's 4, Wan's
  29). The others are the same wherever a clip begins, and kept once.
- Features are kept once where neither a start nor the clip's end falls inside a block of frames that see each other
  (Qwen2.5-VL, timm, the toy encoder), and else encoded from each start: those of V-JEPA 2, VideoMAE 2 and 4DS, whose
  windows are longer than the starts are apart, and whatever is pooled to one grid for the whole clip.
- A part of which so little can be kept once that it takes more space is encoded from each start, too.

A cut clip is like any other: its tokens' times begin at 0.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from data.clip import Clip
from data.codec.decode import TOLERANCE
from data.datasets import ClipDataset, caption_of, video_of
from data.encoded.precompute import Encoding
from data.encoded.shards import from_bytes, to_bytes
from data.rejected import Rejected
from data.selection import Selection
from data.shards.reader import Shards


@dataclass(frozen=True)
class Part:
    """How a part of an encoded clip is cut from that of a longer one.

    Attributes:
        axis: of time, in one sample's tensor.
        steps: of a clip.
        stride: steps from one start to the next.
        own: steps at a clip's beginning that depend on where it begins; `steps` where nothing is kept once.
        frames: of the clip, from which its own steps are made; None: all.
    """

    axis: int
    steps: int
    stride: int
    own: int
    frames: int | None = None

    @classmethod
    def of(cls, axis: int, steps: int, stride: int, own: int, frames: int | None = None) -> "Part":
        """All steps are own ones where that takes less space than these and what is kept once."""
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
        """Everything that a clip is cut from, in order."""
        own = [self.own_name(start)] if self.own else []
        return own + (self.piece_names(start) if self.is_cut else [])

    def cut(self, tensors: list[Tensor]) -> Tensor:
        """The clip of what `names` says."""
        if not self.is_cut:
            return tensors[0]
        own, pieces = ([tensors[0]], tensors[1:]) if self.own else ([], tensors)
        rest = torch.cat(pieces, self.axis).narrow(self.axis, self.own % self.stride, self.steps - self.own)
        return torch.cat([*own, rest], self.axis)


class Stretches(ClipDataset):
    """Captioned videos, of each the stretch of up to `seconds` in its middle that ends with the clip at its last start.

    A sample is that of a clip, with `starts`, the seconds of the video at which clips begin.
    """

    def __init__(self, clips: ClipDataset, seconds: float):
        super().__init__(clips.shards, clips.clip, clips.needs_video, clips.selection)
        self.seconds = seconds

    def _frames(self, members: dict, info: dict, key: int | None) -> dict[str, Tensor | list[float]]:
        clip, video = self.clip, video_of(members)
        room = self.selection.room(video, info, clip)
        kept = int(min(room, (self.seconds - clip.duration) * clip.fps + TOLERANCE)) // clip.period * clip.period
        first = (room - kept) // 2
        starts = [(first + step) / clip.fps for step in range(0, kept + 1, clip.period)]
        stretch = replace(clip, num_frames=clip.num_frames + kept)
        return self.streams(video, stretch, starts[0]) | {"starts": starts}


@dataclass(frozen=True)
class StretchEncoding(Encoding):
    """An `Encoding` of `Stretches`, one at a time: what the `parts` of clips are cut from, and the text."""

    clip: Clip
    parts: dict[str, Part]
    batch_size: int

    def samples(self, batch: dict) -> Iterator[dict]:
        (starts,), (info,), (key,) = batch["starts"], batch["info"], batch["sample"]
        whole = self.encode(batch, "text", *(name for name, part in self.parts.items() if part.is_cut))
        arrays = {}
        for name, part in self.parts.items():
            pieces = whole.pop(name)[0].split(part.stride, part.axis) if part.is_cut else []
            arrays |= {f"{name}.{number}.npy": to_bytes(piece) for number, piece in enumerate(pieces)}
            for first in range(0, len(starts) if part.own else 0, self.batch_size):
                numbers = range(first, min(first + self.batch_size, len(starts)))
                made = self.encode(self._clips(batch, numbers, part.frames), name)[name]
                names = [f"{name}.{part.own_name(number)}" for number in numbers]
                arrays |= {file: to_bytes(own) for file, own in zip(names, made, strict=True)}
        arrays |= {f"{name}.npy": to_bytes(rows[0]) for name, rows in whole.items()}
        yield {"__key__": key, "json": info | {"starts": starts}, **arrays}

    def _clips(self, batch: dict, starts: Iterable[int], frames: int | None) -> dict[str, Tensor]:
        """Both streams of the clips at some starts, as a batch, or of those only the first `frames` frames."""
        clip = self.clip
        slices = {
            "frames": (clip.period, frames or clip.num_frames),
            "semantic_frames": (clip.semantic_period, len(clip.semantic_indices)),
        }
        return {
            name: torch.stack([batch[name][0, start * every : start * every + length] for start in starts])
            for name, (every, length) in slices.items()
            if name in batch
        }


class CutClips(ClipDataset):
    """The samples of a `ClipDataset`, cut from encoded stretches at starts that are drawn from the samples' keys."""

    def __init__(self, shards: Shards, clip: Clip, selection: Selection, parts: dict[str, Part]):
        super().__init__(shards, clip, selection=selection)
        self.parts = parts

    def sample(self, index: int, key: int | None = None) -> dict:
        told = caption_of(self.shards.read(index, only=("json",)), key)
        start = self.selection.drawn(len(told["info"]["starts"]), key)
        files = {name: [f"{name}.{file}" for file in part.names(start)] for name, part in self.parts.items()}
        members = self.shards.read(index, only=("text.npy", *chain(*files.values())))
        if missing := set(chain(*files.values())) - set(members):
            raise Rejected(f"no {min(missing).partition('.')[0]} at one of its starts")
        tensors = {name: [from_bytes(members[file]) for file in files[name]] for name in files}
        encoded = {name: part.cut(tensors[name]) for name, part in self.parts.items()}
        return told | encoded | ({"text": from_bytes(members["text.npy"])} if "text.npy" in members else {})
