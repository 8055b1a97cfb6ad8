"""What the two stages share: a generator prompted by text, and how it learns, validates and samples."""

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from data import random_numbers
from data.batch import Batch
from data.clip import Clip
from lightning_semgen.errors import UserError
from lightning_semgen.model import flow
from lightning_semgen.model.condition import Condition, SemanticTokens
from lightning_semgen.model.generator_network import GeneratorNetwork
from lightning_semgen.model.sizes import size_of
from lightning_semgen.model.transformer import VideoTransformer
from lightning_semgen.model.wan_weights import LATENTS_PER_SECOND, load_wan
from lightning_semgen.stages.clip_stage import ClipStage
from lightning_semgen.stages.compressor_learning import CompressorLearning
from lightning_semgen.stages.frozen_parts import FrozenParts
from lightning_semgen.stages.partner import is_trained, load_partner
from lightning_semgen.stages.semantic_space import SemanticSpace
from lightning_semgen.training.optimizer import adamw
from lightning_semgen.video.generated import LatentVideo

Guidance = list[tuple[Condition, float]]  # conditions to be moved away from, each with its scale


class Stage(ClipStage):
    """A generator conditioned on text, trained by rectified flow.

    Args:
        clip: the nominal clip; the options of data set it.
        encoder: the frozen semantic encoder, a row of `encoders.ENCODERS`.
        encoder_options: options of the encoder itself.
        compressor: "learn", or the folder of the run that learnt the compressor, which is then frozen.
        semantic_dim: d, channels of the semantics; null: no compression.
        encode_semantics: whether encoded shards hold the output of a frozen compressor, 2d numbers a token, and not the
            features, D numbers. Such shards are for that compressor only.
        size: size of the transformer: toy, S, B, 1.3B or 14B.
        init_from: folder or hub id of Wan 2.1's weights in diffusers' format, from which a new fit starts; null: random
            weights.
        text_encoder: "bytes" (small, learnt with the generator, reads 96 bytes), or folder or hub id of a text encoder
            of transformers, or of a pipeline of diffusers that has one.
        rotary_rate: rotary positions per second; null: latents per second of the video (fps / 4 for a VAE that
            compresses time by 4), or Wan's own, 4, with `init_from`.
        lr: peak learning rate. It is reached after `warmup_steps` and falls by a cosine to 0 at trainer.max_steps.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: weight decay of AdamW; biases and norms have none.
        ema_decay: decay of the average of the generator's weights (EMA), which validates and samples.
        compressor_steps: optimiser step at which the compressor is frozen: its learning rate has fallen to 0, and its
            statistics are measured again.
        kl_weight: weight of the compressor's KL to N(0, 1), summed over channels, mean over tokens.
        prompt_dropout: share of training prompts that are replaced by the empty prompt, for guidance.
        guidance_scale: classifier-free guidance on the prompt at sampling; 1: none.
        sampling_steps: steps of the sampler from noise to data.
        sampler: euler or heun.
        time_distribution: distribution of the times in training: logit_normal or uniform.
        compile_blocks: whether a fit compiles the transformer's blocks (torch.compile); takes minutes at its start.
        checkpoint_blocks: activation checkpointing: training keeps the input of each block and runs the block again in
            the backward pass. It takes less memory and more time.
        keep_attention: with `checkpoint_blocks`, whether the output of self-attention is kept and not computed again.
            It saves time, and takes the memory of one more input for each block.
    """

    seconds: tuple[float, ...]  # of the steps of the generated thing, in the nominal clip
    time_stride: int = 4  # frames of a latent step of the VAE
    shift: float  # of the flow's times, in training and sampling of the nominal clip
    partner_run: str | None  # folder of the other stage's run, with which this one makes videos

    def __init__(
        self,
        clip: Clip,
        encoder: str = "toy",
        encoder_options: dict[str, Any] | None = None,
        compressor: str = "learn",
        semantic_dim: int | None = 8,
        encode_semantics: bool = False,
        size: str = "toy",
        init_from: str | None = None,
        text_encoder: str = "bytes",
        rotary_rate: float | None = None,
        lr: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.01,
        ema_decay: float = 0.999,
        compressor_steps: int = 1000,
        kl_weight: float = 1e-6,
        prompt_dropout: float = 0.1,
        guidance_scale: float = 3.0,
        sampling_steps: int = 30,
        sampler: str = "euler",
        time_distribution: str = "logit_normal",
        compile_blocks: bool = False,
        checkpoint_blocks: bool = False,
        keep_attention: bool = True,
    ):
        super().__init__()
        self.clip, self.size, self.init_from, self.rotary_rate = clip, size_of(size), init_from, rotary_rate
        self.lr, self.warmup_steps, self.weight_decay, self.ema_decay = lr, warmup_steps, weight_decay, ema_decay
        self.kl_weight, self.prompt_dropout = kl_weight, prompt_dropout
        self.guidance_scale, self.sampling_steps = guidance_scale, sampling_steps
        self.sampler = flow.look_up("sampler", flow.SAMPLERS, sampler)
        self.time_distribution = flow.look_up("time_distribution", flow.TIME_DISTRIBUTIONS, time_distribution)
        self.compile_blocks, self.checkpoint_blocks = compile_blocks, checkpoint_blocks
        self.keep_attention = keep_attention
        self.space = self.compressor_learning = None
        if encoder != "none":
            run = None if compressor == "learn" else compressor
            self.space = SemanticSpace(clip, encoder, encoder_options or {}, semantic_dim, run)
        self.compressor_steps = compressor_steps if semantic_dim is not None else 0  # nothing to learn without d
        if self.space is not None and compressor == "learn":
            self.compressor_learning = CompressorLearning(self.space, self.compressor_steps)
        self.frozen = FrozenParts(clip, self.space, encode_semantics, text_encoder)

    def build_generator(
        self,
        channels: int,
        patch: tuple[int, int, int],
        semantic_dim: int | None = None,
        window_seconds: float | None = None,
        absolute_time: bool = False,
    ) -> None:
        """Builds the generator of z with that many channels, and its EMA."""
        text = self.frozen.text
        rotary_rate = self.rotary_rate or (LATENTS_PER_SECOND if self.init_from else self.clip.fps / self.time_stride)
        transformer = VideoTransformer(
            channels, text.dim, self.size, patch, semantic_dim, rotary_rate, window_seconds, self.checkpoint_blocks,
            absolute_time, self.keep_attention,
        )  # fmt: skip
        self.train_network(GeneratorNetwork(text if text.learnt else nn.Identity(), transformer))

    @property
    def learns_compressor(self) -> bool:
        return self.compressor_learning is not None

    def configure_callbacks(self) -> list[CompressorLearning]:
        return [self.compressor_learning] if self.learns_compressor else []

    def setup(self, stage: str) -> None:
        self.frozen.to(self.device)
        if stage == "fit" and self.compile_blocks:
            self.compile_networks()
        if stage == "fit" or self.trainer.ckpt_path:
            self.load_compressor()
        if stage == "fit" and self.init_from and not self.trainer.ckpt_path:
            load_wan(self.generator.transformer, self.init_from)
            self.ema.load_state_dict(self.generator.state_dict())

    # Learning

    def flow_loss(
        self, network: GeneratorNetwork, z_0: Tensor, batch: Batch, t: Tensor, condition: Condition
    ) -> Tensor:
        """Squared error of the velocity of each sample (B,), at times t (B,)."""
        eps = random_numbers.normal(batch["key"], "noise", *z_0.shape[1:])
        v = network(flow.interpolate(z_0, eps, t), t, condition, self.seconds_of(self.clip_of(batch)))
        return (v.float() - flow.velocity(z_0, eps)).square().flatten(1).mean(1)

    def losses(self, batch: Batch, t: Tensor, prompt: Tensor) -> dict[str, Tensor]:
        """Losses of a training step at times t (B,): the flow loss (B,) and scalars of a learnt compressor."""
        raise NotImplementedError

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The loss that is minimised, a scalar."""
        return sum((self.kl_weight if name == "kl" else 1) * loss.mean() for name, loss in losses.items())

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The loss at random times, with dropped prompts, and the values that `callbacks.loss_curves` logs."""
        noise = random_numbers.normal(batch["key"], "time")
        t = self.time_distribution(noise, self.shift_of(self.clip_of(batch)))
        losses = self.losses(batch, t, self.frozen.prompt(batch, self.prompt_dropout))
        return {"loss": self.total(losses), "t": t} | {name: loss.detach() for name, loss in losses.items()}

    def validation_times(self, batch: Batch) -> Tensor:
        """Fixed times (B,) that fill the training distribution evenly, whatever the number of samples."""
        quantile = (0.5 + batch["position"].double() * (math.sqrt(5) - 1) / 2) % 1
        return self.time_distribution(torch.special.ndtri(quantile), self.shift).float()

    def configure_optimizers(self) -> dict:
        if (steps := self.trainer.max_steps) <= 0:
            raise UserError("How long? Set trainer.max_steps: the learning rate falls to 0 there.")
        if self.learns_compressor:
            self.compressor_learning.check(steps)
        trained, others = list(self.generator.named_parameters()), self.compressor_parameters()
        return adamw(trained, others, self.lr, self.weight_decay, self.warmup_steps, steps, self.compressor_steps)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        frozen = not self.learns_compressor or self.global_step > self.compressor_steps
        checkpoint["fingerprint"] = self.fingerprint()
        checkpoint["semantics"] = {"encoder": "none"} if self.space is None else self.space.facts | {"frozen": frozen}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.frozen.check_trained_with(checkpoint.get("fingerprint", {}))

    # Sampling

    @torch.no_grad()
    def sample(self, shape: tuple[int, ...], keys: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        """Generates (B, *shape) with the EMA; the text of the conditions is not yet embedded."""
        network = self.ema
        own, *others = [network.read(each) for each in (condition, *(without for without, _ in guidance))]

        def predict(z: Tensor, t: Tensor) -> Tensor:
            v, *without = [network.transformer(z, t, each, self.seconds) for each in (own, *others)]
            return flow.guide(v, *zip(without, [scale for _, scale in guidance], strict=True))

        noise = random_numbers.normal(keys, type(self).__name__, *shape)
        return self.sampler(predict, noise, flow.sampling_times(self.sampling_steps, self.shift))

    def condition(self, captions: list[str], semantics: SemanticTokens | None = None) -> Condition:
        return Condition(self.frozen.text.prepare(captions), semantics)

    def without_prompt(self, count: int, semantics: SemanticTokens | None = None) -> Guidance:
        """Guidance on the prompt of `count` samples: away from the empty one."""
        if self.guidance_scale == 1:
            return []
        return [(self.condition([""] * count, semantics), self.guidance_scale)]

    @cached_property
    def partner(self) -> "Stage":
        """The other stage, from its run; UserError where there is none or its semantics are of another space."""
        return load_partner(self)

    def can_make_videos(self) -> bool:
        return is_trained(self.partner_run)

    def videos(self, captions: list[str], keys: Tensor) -> list[LatentVideo]:
        """Videos for prompts; each depends on its prompt and key alone."""
        raise NotImplementedError

    def reference_semantics(self, batch: Batch) -> Tensor:
        """z_sem (B, T', H', W', d) of reference videos; row b depends on its video and key alone."""
        if self.space is None:
            raise UserError("A reference is followed through its semantics, and a run with encoder none has none.")
        return self.space(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[LatentVideo]]:
        return {"videos": self.videos(batch["caption"], batch["key"])}
