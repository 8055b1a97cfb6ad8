"""Which encoded shards a config asks for: of which clips, made by what."""

from dataclasses import dataclass
from pathlib import Path

from data.clip import Clip
from data.encoded.encoding import Encoding, StretchEncoding
from data.interface import ClipModel
from data.selection import Selection
from lightning_semgen.errors import UserError


@dataclass(frozen=True)
class EncodedOptions:
    """Where encoded shards are and what they hold.

    Attributes:
        folder: with a folder for each split.
        seconds: of each split's videos that they hold; None: one clip of each.
    """

    folder: Path
    seconds: dict[str, float | None]
    clip: Clip
    selection: Selection

    def check_room(self) -> None:
        """UserError if that many seconds have room for one start only."""
        seconds, clip = self.seconds["train"], self.clip
        apart = clip.period / clip.fps
        if seconds is not None and not seconds >= (least := clip.duration + apart):
            raise UserError(
                f"data.encoded_seconds is {seconds:g}, which has room for one clip of {clip.duration:g} s alone: whole"
                f" latents and semantic steps begin together every {apart:g} s. Give {least:g} or more, or null for one"
                " clip of each video."
            )

    @property
    def bounds(self) -> dict[str, float]:
        """The limits below which a video is rejected."""
        return {"min_duration": self.selection.min_duration, "min_fps": self.selection.min_fps}

    def fingerprint(self, split: str, model: ClipModel) -> dict:
        return model.fingerprint() | {"encoded_seconds": self.seconds[split]} | self.bounds

    def encoding(self, split: str, model: ClipModel, batch_size: int) -> Encoding:
        """How a model encodes the clips of a split, or stretches of the videos in batches of `batch_size` clips."""
        what = self.folder / split, self.fingerprint(split, model), model.precompute
        if self.seconds[split] is None:
            return Encoding(*what)
        return StretchEncoding(*what, self.clip, model.cut_parts, batch_size)
