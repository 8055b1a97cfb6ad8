"""A stage as the data sees it: which clips it takes, and what its frozen parts say of them."""

from dataclasses import replace

from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from data.batch import Batch, own_rows
from data.clip import Clip
from data.encoded.parts import Part
from lightning_semgen.stages.frozen_parts import FrozenParts
from lightning_semgen.stages.semantic_space import SemanticSpace
from lightning_semgen.training.module import TrainedModule


class ClipStage(TrainedModule):
    """Implements `data.interface.ClipModel`.

    Attributes:
        clip: the nominal clip; a batch of a bucket has another shape.
        space: None for the one-stage baseline, which has no semantics.
        frozen: encoder, VAE and text encoder, outside the module tree.
    """

    clip: Clip
    space: SemanticSpace | None
    frozen: FrozenParts

    def check_clip(self, clip: Clip) -> None:
        """UserError for a clip that this stage cannot be trained on."""
        if self.space is not None:
            self.space.grid_of(clip)

    @property
    def needs_video(self) -> bool:
        return self.frozen.needs_video

    @property
    def cut_parts(self) -> dict[str, Part]:
        return self.frozen.cut_parts

    def fingerprint(self) -> dict:
        return self.frozen.fingerprint()

    def precompute(self, batch: Batch, *only: str) -> dict[str, Tensor | list[Tensor]]:
        """`FrozenParts.precompute` on the trainer's device."""
        device = self.trainer.strategy.root_device
        self.frozen.to(device)
        if self.frozen.encode_semantics:
            self.space.to(device)
        return self.frozen.precompute(move_data_to_device(batch, device), *only)

    def load_compressor(self) -> None:
        """A frozen compressor's weights, from the checkpoint that this stage starts from or the run that learnt it."""
        if self.space is not None and self.space.run:
            self.space.load_compressor(self.trainer.ckpt_path or self.space.run)

    def compressor_parameters(self) -> list[nn.Parameter]:
        """Parameters of a learnt compressor and of the decoder that teaches it."""
        generator = set(self.generator.parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in generator]

    def seconds_of(self, clip: Clip) -> tuple[float, ...]:
        raise NotImplementedError

    def shift_of(self, clip: Clip) -> float:
        raise NotImplementedError

    def clip_of(self, batch: Batch) -> Clip:
        """The clip of a batch: the nominal clip, unless the batch has a `shape` (num_frames, height, width)."""
        if "shape" not in batch:
            return self.clip
        num_frames, height, width = batch["shape"][0]
        return replace(self.clip, num_frames=num_frames, height=height, width=width)

    def log_validation(self, name: str, losses: Tensor, batch: Batch) -> None:
        """Logs the mean of losses (B,) over all validation clips; each counts once, on any number of ranks."""
        own = losses[own_rows(batch)]
        self.log(f"val/{name}", own.sum() / max(len(own), 1), batch_size=len(own), sync_dist=True)
