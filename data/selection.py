"""Which videos are used, and which part of each."""

from dataclasses import dataclass

from data.clip import Clip
from data.codec.decode import TOLERANCE, declared
from data.random_numbers import sample_key
from data.rejected import Rejected
from data.shards.records import measured_by_pack

LONGEST = 1e8  # seconds; beyond, timestamps may not fit the container's numbers


@dataclass(frozen=True)
class Selection:
    """Where clips begin, "random" or "centre", and the seconds and frames per second that a video must have."""

    start: str = "random"
    min_duration: float = 0.0
    min_fps: float = 0.0

    def begin(self, video: bytes, info: dict, clip: Clip, key: int | None) -> float:
        """The second at which the clip of a video begins, a whole number of its frames; raises `Rejected`."""
        return self.drawn(self.room(video, info, clip) + 1, key) / clip.fps

    def room(self, video: bytes, info: dict, clip: Clip) -> int:
        """By how many frames a video is longer than the clip, 0 where it is shorter; raises `Rejected`."""
        facts = measured_by_pack(info, len(video))  # by `lightning pack`, exact
        if facts.get("fps") is None:
            facts = declared(video)
        if facts["duration"] > LONGEST:
            raise Rejected("its container says it lasts for years")
        if 0 < facts["duration"] < self.min_duration:
            raise Rejected(f"shorter than {self.min_duration:g} s (data.min_duration)")
        if 0 < facts["fps"] < self.min_fps - TOLERANCE:
            raise Rejected(f"slower than {self.min_fps:g} fps (data.min_fps)")
        return max(0, int((facts["duration"] - clip.duration - TOLERANCE) * clip.fps))

    def drawn(self, starts: int, key: int | None) -> int:
        """One of so many starts: random ones are drawn from a sample's key; without one that in the middle."""
        middle = key is None or self.start == "centre"
        return (starts - 1) // 2 if middle else sample_key(key, "clip start") % starts


def select_caption(info: dict, key: int | None) -> str:
    """A sample's caption, one of them by its key where there are several; without a key the first."""
    captions = info["caption"]
    if isinstance(captions, str):
        return captions
    return captions[0 if key is None else sample_key(key, "caption") % len(captions)]
