"""The semantic stage: prompts to semantics (SemanticGen §3.3)."""

from einops import rearrange
from torch import Tensor

from data.batch import Batch
from data.clip import Clip
from lightning_semgen.errors import UserError
from lightning_semgen.model import flow
from lightning_semgen.model.compressor import FeatureDecoder
from lightning_semgen.model.condition import Condition
from lightning_semgen.stages.base import Stage
from lightning_semgen.video.generated import LatentVideo


class SemanticStage(Stage):
    """The compressor and the semantic generator (SemanticGen §3.3): prompt → semantics.

    Args:
        latent_run: run of the latent stage that turns semantics into videos; null: the run that learnt the compressor.
        shift: shift of the flow's times towards noise; null: √(N·d / 4096) for N tokens of the nominal clip, 1 to 8.
        absolute_time: whether the input layer adds an embedding of each token's time in the clip. Rotary positions are
            relative, so that without it nothing but the clip's ends tells one scene from another.
    """

    partner_option = "--model.latent_run"

    def __init__(
        self, latent_run: str | None = None, shift: float | None = None, absolute_time: bool = False, **options
    ):
        super().__init__(**options)
        if self.space is None:
            raise UserError("SemanticStage generates an encoder's features: model.encoder cannot be none.")
        self.partner_run = latent_run or self.space.run
        self.given_shift = shift
        self.seconds, self.shift = self.seconds_of(self.clip), self.shift_of(self.clip)
        self.build_generator(self.space.channels, patch=(1, 1, 1), absolute_time=absolute_time)
        if self.learns_compressor and self.space.compressor.dim is not None:
            self.feature_decoder = FeatureDecoder(self.space.channels, self.space.encoder.dim)

    def seconds_of(self, clip: Clip) -> tuple[float, ...]:
        return self.space.grid_of(clip).seconds

    def shift_of(self, clip: Clip) -> float:
        return self.given_shift or flow.dimension_shift(len(self.space.grid_of(clip)) * self.space.channels)

    def losses(self, batch: Batch, t: Tensor, prompt: Tensor) -> dict[str, Tensor]:
        if self.learns_compressor:
            batch = batch | {"features": self.space.features(batch)}  # which the compressor's teacher looks at too
        z_sem, posterior = self.space.sample(batch)
        flow_loss = self.flow_loss(self.generator, channels_first(z_sem.detach()), batch, t, Condition(prompt))
        losses = {"flow_loss": flow_loss}
        if not self.learns_compressor:
            return losses
        if self.space.compressor.dim is not None:
            losses["reconstruction"] = self.feature_decoder(posterior.z, batch["features"])
        return losses | {"kl": self.compressor_learning.kl(posterior, self.global_step)}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The flow loss; and the semantics with their KL, of which `callbacks.channels` makes curves."""
        z_sem, posterior = self.space.sample(batch)
        t, condition = self.validation_times(batch), Condition(self.frozen.prompt(batch))
        losses = self.flow_loss(self.ema, channels_first(z_sem), batch, t, condition)
        self.log_validation("flow_loss", losses, batch)
        return {"z_sem": z_sem, "kl": posterior.kl}

    def sample_semantics(self, captions: list[str], keys: Tensor) -> Tensor:
        """z_sem (B, T', H', W', d) for prompts."""
        grid = self.space.grid
        shape = (self.space.channels, len(grid.seconds), grid.height, grid.width)
        z_sem = self.sample(shape, keys, self.condition(captions), self.without_prompt(len(captions)))
        return rearrange(z_sem, "b d t h w -> b t h w d")

    def videos(self, captions: list[str], keys: Tensor) -> list[LatentVideo]:
        return self.partner.render(captions, keys, self.sample_semantics(captions, keys))

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        if "reference" in batch:
            return {"semantics": self.reference_semantics(batch)}
        return {"semantics": self.sample_semantics(batch["caption"], batch["key"])}


def channels_first(z_sem: Tensor) -> Tensor:
    """(B, T', H', W', d) to (B, d, T', H', W')."""
    return rearrange(z_sem, "b t h w d -> b d t h w")
