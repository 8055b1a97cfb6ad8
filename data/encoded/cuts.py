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

from dataclasses import replace
from itertools import chain

from torch import Tensor

from data.clip import Clip
from data.codec.decode import TOLERANCE
from data.datasets import ClipDataset, caption_of, video_of
from data.encoded.parts import Part
from data.encoded.shards import from_bytes
from data.rejected import Rejected
from data.selection import Selection
from data.shards.reader import Shards


class Stretches(ClipDataset):
    """Captioned videos; of each, the middle part of at most `seconds`, which ends with the clip at its last start.

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


class CutClips(ClipDataset):
    """The samples of a `ClipDataset`, cut from encoded stretches at starts that are drawn from the samples' keys."""

    def __init__(self, shards: Shards, clip: Clip, selection: Selection, parts: dict[str, Part]):
        super().__init__(shards, clip, selection=selection)
        self.parts = parts

    def sample(self, index: int, key: int | None = None) -> dict:
        described = caption_of(self.shards.read(index, only=("json",)), key)
        starts = described["info"].get("starts")  # by `StretchEncoding`
        if not isinstance(starts, list) or not starts:
            raise Rejected("no starts of clips")
        start = self.selection.drawn(len(starts), key)
        files = {name: [f"{name}.{file}" for file in part.names(start)] for name, part in self.parts.items()}
        members = self.shards.read(index, only=("text.npy", *chain(*files.values())))
        if missing := set(chain(*files.values())) - set(members):
            raise Rejected(f"no {min(missing).partition('.')[0]} at one of its starts")
        tensors = {name: [from_bytes(members[file]) for file in files[name]] for name in files}
        encoded = {name: part.cut(tensors[name]) for name, part in self.parts.items()}
        return described | encoded | ({"text": from_bytes(members["text.npy"])} if "text.npy" in members else {})
