"""The two stages of SemanticGen: prompts to semantics, and prompts with semantics to latents."""

import torch
from einops import rearrange
from torch import Tensor

from data.clip import Clip
from encoders.vae import FrozenVAE
from lightning_semgen import flow, keyed
from lightning_semgen.compressor import FeatureDecoder
from lightning_semgen.errors import UserError
from lightning_semgen.positions import Grid
from lightning_semgen.stage import Stage
from lightning_semgen.transformer import Semantics
from lightning_semgen.video import Video

PATCH = (1, 2, 2)  # latents of a token


class SemanticStage(Stage):
    """The compressor and the semantic generator (SemanticGen §3.3): prompt → semantics.

    Args:
        latent_run: run of the latent stage that shows the semantics as videos; null: the run of the compressor.
        shift: of the flow's times towards noise; null: by the number of values of the nominal clip's semantics.
        absolute_time: whether the generator is told when in the clip a token is, which Wan's network is not: its rotary
            positions are relative and its text has none, so nothing but the clip's ends tells one scene from another.
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

    def losses(self, batch: dict, t: Tensor, prompt: Tensor) -> dict[str, Tensor]:
        if self.learns_compressor:
            batch = batch | {"features": self.space.features(batch)}  # which the compressor's teacher looks at too
        z_sem, posterior = self.space.sample(batch)
        losses = {"flow_loss": self.flow_loss(self.generator, channels_first(z_sem.detach()), batch, t, prompt, None)}
        if not self.learns_compressor:
            return losses
        if self.space.compressor.dim is not None:
            losses["reconstruction"] = self.feature_decoder(posterior.z, batch["features"])
        return losses | {"kl": self.kl(posterior)}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        z_sem, t = channels_first(self.validation_semantics(batch)), self.validation_times(batch)
        losses = self.flow_loss(self.ema, z_sem, batch, t, self.prompt(batch), None)
        self.log("val/flow_loss", losses.mean(), batch_size=len(losses), sync_dist=True)

    def sample_semantics(self, captions: list[str], keys: Tensor) -> Tensor:
        """z_sem (B, T', H', W', d) for prompts."""
        grid = self.space.grid
        shape = (self.space.channels, len(grid.seconds), grid.height, grid.width)
        without = [([""] * len(captions), None, self.guidance_scale)] if self.guidance_scale != 1 else []
        return rearrange(self.sample(shape, captions, keys, None, without), "b d t h w -> b t h w d")

    def videos(self, captions: list[str], keys: Tensor) -> list[Video]:
        return self.partner.render(captions, keys, self.sample_semantics(captions, keys))

    def predict_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        if "reference" in batch:
            return {"semantics": self.reference_semantics(batch)}
        return {"semantics": self.sample_semantics(batch["caption"], batch["key"])}


class LatentStage(Stage):
    """The latent generator (SemanticGen §3.2): prompt and semantics → VAE latents; with `encoder: none` the baseline.

    Args:
        vae: a row of `encoders.vae.VAES`.
        vae_weights: folder of its weights; null: its own, where they are embedded.
        semantic_run: run of the semantic stage that turns prompts into semantics; null: the run of the compressor.
        window_seconds: T_w of self-attention's windows, for clips that are longer; null: every token attends to all.
        shift: of the flow's times towards noise.
        semantic_noise: training noises semantics to a time τ drawn evenly from 0 to this.
        sampling_semantic_noise: the fixed τ at sampling.
        semantic_dropout: share of training samples whose semantics are pure noise (τ = 1), for guidance on them.
        semantic_guidance_scale: classifier-free guidance on the semantics at sampling; 1 is none.
    """

    partner_option = "--model.semantic_run"

    def __init__(
        self,
        vae: str = "toy",
        vae_weights: str | None = None,
        semantic_run: str | None = None,
        window_seconds: float | None = 5.0,
        shift: float = 1.0,
        semantic_noise: float = 0.3,
        sampling_semantic_noise: float = 0.05,
        semantic_dropout: float = 0.0,
        semantic_guidance_scale: float = 1.0,
        **options,
    ):
        super().__init__(**options)
        if semantic_guidance_scale != 1 and not semantic_dropout:
            raise UserError("model.semantic_guidance_scale needs a model trained with model.semantic_dropout > 0.")
        if window_seconds is not None and not window_seconds > 0:
            raise UserError(f"model.window_seconds is {window_seconds}: give seconds > 0, or null for full attention.")
        self.frozen.add_vae(vae, vae_weights)
        self.time_stride = self.vae.time_stride
        self.partner_run = semantic_run or (self.space.run if self.space is not None else None)
        self.shift, self.semantic_noise, self.sampling_semantic_noise = shift, semantic_noise, sampling_semantic_noise
        self.semantic_dropout, self.semantic_guidance_scale = semantic_dropout, semantic_guidance_scale
        self.seconds, self.latent_shape = self.seconds_of(self.clip), self.latent_shape_of(self.clip)
        semantic_dim = None if self.space is None else self.space.channels
        self.build_generator(self.vae.channels, PATCH, semantic_dim, window_seconds)

    def seconds_of(self, clip: Clip) -> tuple[float, ...]:
        return tuple(self.vae.seconds(clip.times).tolist())

    def shift_of(self, clip: Clip) -> float:
        return self.shift

    def latent_shape_of(self, clip: Clip) -> tuple[int, int, int, int]:
        """(C, T_z, H_z, W_z); UserError where there are no whole latents, or they make no whole tokens."""
        shape = (self.vae.channels, *self.vae.grid(clip.num_frames, clip.height, clip.width))
        if shape[2] % PATCH[1] or shape[3] % PATCH[2]:
            raise UserError(
                f"Frames of {clip.height}×{clip.width} do not divide into the transformer's tokens: with this VAE"
                f" data.height and width must be multiples of {2 * self.vae.space_stride}."
            )
        return shape

    def check_clip(self, clip: Clip) -> None:
        super().check_clip(clip)
        self.latent_shape_of(clip)

    @property
    def vae(self) -> FrozenVAE:
        return self.frozen.vae

    def noised(self, z_sem: Tensor, keys: Tensor, tau: Tensor, grid: Grid) -> Semantics:
        """Semantics (B, T', H', W', d) at the flow's times tau (B,)."""
        noise = keyed.normal(keys, "semantic noise", *z_sem.shape[1:])
        return Semantics(flow.interpolate(z_sem, noise, tau), tau, grid)

    def training_noise(self, keys: Tensor) -> Tensor:
        """τ (B,): even on [0, semantic_noise], and 1 for dropped semantics."""
        tau = self.semantic_noise * keyed.uniform(keys, "semantic noise level")
        return torch.where(keyed.uniform(keys, "semantic dropout") < self.semantic_dropout, torch.ones_like(tau), tau)

    def losses(self, batch: dict, t: Tensor, prompt: Tensor) -> dict[str, Tensor]:
        if self.space is None:
            return {"flow_loss": self.flow_loss(self.generator, self.frozen.latents(batch), batch, t, prompt, None)}
        z_sem, posterior = self.space.sample(batch)
        tau, grid = self.training_noise(batch["key"]), self.space.grid_of(self.clip_of(batch))
        semantics = self.noised(z_sem, batch["key"], tau, grid)
        losses = {"flow_loss": self.flow_loss(self.generator, self.frozen.latents(batch), batch, t, prompt, semantics)}
        return losses | {"kl": self.kl(posterior)} if self.learns_compressor else losses

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Flow loss, and the semantic gap: how much it grows with the semantics of the clip before; 0 if ignored."""
        t, latents, prompt = self.validation_times(batch), self.frozen.latents(batch), self.prompt(batch)
        own = None if self.space is None else self.inference_semantics(self.validation_semantics(batch), batch["key"])
        losses = self.flow_loss(self.ema, latents, batch, t, prompt, own)
        self.log("val/flow_loss", losses.mean(), batch_size=len(losses), sync_dist=True)
        if own is None:
            return
        before = self._before if batch_idx else own.z[-1:]
        self._before = own.z[-1:]
        if batch_idx or len(own.z) > 1:  # the first clip, where it is alone, has none before it
            other = Semantics(torch.cat([before, own.z[:-1]]), own.tau, own.grid)
            gap = self.flow_loss(self.ema, latents, batch, t, prompt, other) - losses
            self.log("val/semantic_gap", gap.mean(), batch_size=len(losses), sync_dist=True)

    def inference_semantics(self, z_sem: Tensor, keys: Tensor) -> Semantics:
        tau = z_sem.new_full((len(z_sem),), self.sampling_semantic_noise)
        return self.noised(z_sem, keys, tau, self.space.grid)

    def render(self, captions: list[str], keys: Tensor, z_sem: Tensor | None) -> list[Video]:
        """Videos for prompts and, unless this is the baseline, semantics (B, T', H', W', d)."""
        semantics, without = None, []
        if self.space is not None:
            semantics = self.inference_semantics(z_sem, keys)
        if self.guidance_scale != 1:
            without.append(([""] * len(captions), semantics, self.guidance_scale))
        if semantics is not None and self.semantic_guidance_scale != 1:
            none = self.noised(z_sem, keys, torch.ones_like(semantics.tau), semantics.grid)
            without.append((captions, none, self.semantic_guidance_scale))
        latents = self.sample(self.latent_shape, captions, keys, semantics, without)
        return [Video(z, self.vae) for z in latents]

    def can_make_videos(self) -> bool:
        return self.space is None or super().can_make_videos()

    def videos(self, captions: list[str], keys: Tensor) -> list[Video]:
        z_sem = None if self.space is None else self.partner.sample_semantics(captions, keys)
        return self.render(captions, keys, z_sem)

    def predict_step(self, batch: dict, batch_idx: int) -> dict[str, list[Video]]:
        captions, keys = batch["caption"], batch["key"]
        if "reference" in batch:
            return {"videos": self.render(captions, keys, self.reference_semantics(batch))}
        return {"videos": self.videos(captions, keys)}


def channels_first(z_sem: Tensor) -> Tensor:
    """(B, T', H', W', d) to (B, d, T', H', W')."""
    return rearrange(z_sem, "b t h w d -> b d t h w")
