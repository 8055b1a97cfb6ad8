"""The latent stage: prompts and semantics to VAE latents (SemanticGen §3.2)."""

from dataclasses import replace

import torch
from torch import Tensor

from data import random_numbers
from data.batch import Batch
from data.clip import Clip
from encoders.vae.base import FrozenVAE
from lightning_semgen.errors import UserError
from lightning_semgen.model import flow
from lightning_semgen.model.condition import Condition, SemanticTokens
from lightning_semgen.model.positions import Grid
from lightning_semgen.stages.base import Stage
from lightning_semgen.video.generated import LatentVideo

PATCH = (1, 2, 2)  # latents of a token


class LatentStage(Stage):
    """The latent generator (SemanticGen §3.2): prompt and semantics → VAE latents; with `encoder: none` the baseline.

    Args:
        vae: the frozen VAE: toy, wan or taef2.
        vae_weights: folder of its weights; null: the embedded ones, or those in the local cache.
        semantic_run: run of the semantic stage that turns prompts into semantics; null: the run that learnt the
            compressor.
        window_seconds: length T_w of the windows of self-attention, for clips that are longer; null: full attention.
        shift: shift of the flow's times towards noise, in training and sampling; 1: none.
        semantic_noise: in training, semantics are noised to a time τ that is drawn evenly from 0 to this.
        sampling_semantic_noise: the fixed τ at sampling.
        semantic_dropout: share of training samples whose semantics are pure noise (τ = 1), for guidance on semantics.
        semantic_guidance_scale: classifier-free guidance on the semantics at sampling; 1: none.
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

    def noised(self, z_sem: Tensor, keys: Tensor, tau: Tensor, grid: Grid) -> SemanticTokens:
        """Noises semantics (B, T', H', W', d) to the flow's times tau (B,); the network gets tau as their time."""
        noise = random_numbers.normal(keys, "semantic noise", *z_sem.shape[1:])
        return SemanticTokens(flow.interpolate(z_sem, noise, tau), tau, grid)

    def training_noise(self, keys: Tensor) -> Tensor:
        """τ (B,): even on [0, semantic_noise], and 1 for dropped semantics."""
        tau = self.semantic_noise * random_numbers.uniform(keys, "semantic noise level")
        return torch.where(
            random_numbers.uniform(keys, "semantic dropout") < self.semantic_dropout, torch.ones_like(tau), tau
        )

    def losses(self, batch: Batch, t: Tensor, prompt: Tensor) -> dict[str, Tensor]:
        semantics = posterior = None
        if self.space is not None:
            z_sem, posterior = self.space.sample(batch)
            tau, grid = self.training_noise(batch["key"]), self.space.grid_of(self.clip_of(batch))
            semantics = self.noised(z_sem, batch["key"], tau, grid)
        latents, condition = self.frozen.latents(batch), Condition(prompt, semantics)
        losses = {"flow_loss": self.flow_loss(self.generator, latents, batch, t, condition)}
        if self.learns_compressor:
            losses["kl"] = self.compressor_learning.kl(posterior, self.global_step)
        return losses

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Flow loss, and the semantic gap: how much it grows with the semantics of the clip before; 0 if ignored."""
        t, latents, prompt = self.validation_times(batch), self.frozen.latents(batch), self.frozen.prompt(batch)
        own, shown = None, {}
        if self.space is not None:
            z_sem, posterior = self.space.sample(batch)
            own, shown = self.inference_semantics(z_sem, batch["key"]), {"z_sem": z_sem, "kl": posterior.kl}
        losses = self.flow_loss(self.ema, latents, batch, t, Condition(prompt, own))
        self.log_validation("flow_loss", losses, batch)
        if own is None:
            return shown
        before = self._before if batch_idx else own.z[-1:]
        self._before = own.z[-1:]
        if batch_idx or len(own.z) > 1:  # the first clip, where it is alone, has none before it
            other = Condition(prompt, replace(own, z=torch.cat([before, own.z[:-1]])))
            gap = self.flow_loss(self.ema, latents, batch, t, other) - losses
            self.log_validation("semantic_gap", gap, batch)
        return shown

    def inference_semantics(self, z_sem: Tensor, keys: Tensor) -> SemanticTokens:
        tau = z_sem.new_full((len(z_sem),), self.sampling_semantic_noise)
        return self.noised(z_sem, keys, tau, self.space.grid)

    def render(self, captions: list[str], keys: Tensor, z_sem: Tensor | None) -> list[LatentVideo]:
        """Videos for prompts and, unless this is the baseline, semantics (B, T', H', W', d)."""
        semantics = None if self.space is None else self.inference_semantics(z_sem, keys)
        guidance = self.without_prompt(len(captions), semantics)
        if semantics is not None and self.semantic_guidance_scale != 1:
            noise = self.noised(z_sem, keys, torch.ones_like(semantics.tau), semantics.grid)
            guidance.append((self.condition(captions, noise), self.semantic_guidance_scale))
        latents = self.sample(self.latent_shape, keys, self.condition(captions, semantics), guidance)
        return [LatentVideo(z, self.vae) for z in latents]

    def can_make_videos(self) -> bool:
        return self.space is None or super().can_make_videos()

    def videos(self, captions: list[str], keys: Tensor) -> list[LatentVideo]:
        z_sem = None if self.space is None else self.partner.sample_semantics(captions, keys)
        return self.render(captions, keys, z_sem)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, list[LatentVideo]]:
        captions, keys = batch["caption"], batch["key"]
        if "reference" in batch:
            return {"videos": self.render(captions, keys, self.reference_semantics(batch))}
        return {"videos": self.videos(captions, keys)}
