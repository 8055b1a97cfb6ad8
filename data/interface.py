"""What the data asks of a model."""

from typing import Protocol

from torch import Tensor

from data.batch import Batch
from data.clip import Clip
from data.encoded.parts import Part


class ClipModel(Protocol):
    """A LightningModule that trains on clips and has frozen parts whose output encoded shards hold.

    Attributes:
        needs_video: whether it needs frames at the full rate, or those of the semantic stream will do.
        cut_parts: how what is encoded of a clip, but for its text, is cut from that of a longer one.
    """

    needs_video: bool
    cut_parts: dict[str, Part]

    def check_clip(self, clip: Clip) -> None:
        """UserError for a clip that the model cannot be trained on."""

    def load_compressor(self) -> None:
        """Makes ready whatever frozen weights `precompute` needs."""

    def fingerprint(self) -> dict:
        """What encoded shards must have been made with to fit."""

    def precompute(self, batch: Batch, *only: str) -> dict[str, Tensor | list[Tensor]]:
        """What all or some frozen parts say of a batch of clips: {"features": (B, …), "text": B × (L, dim), …}."""
