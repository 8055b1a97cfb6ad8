"""What the two stages share: a generator prompted by text and its EMA twin, and how they learn, validate and sample."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from data import random_numbers
from data.clip import Clip
from encoders.text import ByteTextEncoder, FrozenTextEncoder
from lightning_semgen.errors import UserError
from lightning_semgen.evaluation.adherence import Adherence
from lightning_semgen.evaluation.channel_statistics import ChannelStatistics
from lightning_semgen.evaluation.flow_loss_bands import TimeBands
from lightning_semgen.model import flow
from lightning_semgen.model.compressor import Posterior
from lightning_semgen.model.condition import SemanticTokens
from lightning_semgen.model.sizes import size_of
from lightning_semgen.model.transformer import VideoTransformer
from lightning_semgen.model.wan_weights import LATENTS_PER_SECOND, load_wan
from lightning_semgen.runs import LAST, load_stage
from lightning_semgen.stages.frozen_parts import FrozenParts
from lightning_semgen.stages.semantic_space import SemanticSpace
from lightning_semgen.training.checkpoints import is_checkpoint
from lightning_semgen.training.optimizer import adamw
from lightning_semgen.training.strategies import named, shard, total_norm
from lightning_semgen.video.generated import LatentVideo


class GeneratorNetwork(nn.Module):
    """What is trained: the transformer and, if it is learnt, the text encoder."""

    def __init__(self, text: nn.Module, transformer: VideoTransformer):
        super().__init__()
        self.text, self.transformer = text, transformer

    def forward(
        self, z: Tensor, t: Tensor, prompt: Tensor, seconds: tuple[float, ...], semantics: SemanticTokens | None = None
    ) -> Tensor:
        return self.transformer(z, t, self.text(prompt), seconds, semantics)


class Stage(LightningModule):
    """A text-prompted generator trained by rectified flow.

    Args:
        clip: the nominal clip; set by the data's options.
        encoder: the frozen semantic encoder, a row of `encoders.ENCODERS`.
        encoder_options: the encoder's own options.
        compressor: "learn", or the folder of the run that learnt it.
        semantic_dim: d, channels of the semantics; null: no compression.
        encode_semantics: whether encoded shards hold what a frozen compressor makes of the features in their place: 2d
            numbers a token instead of D, good for that compressor alone.
        size: a row of `transformer.SIZES`.
        init_from: folder or hub id of Wan 2.1's weights in diffusers' format, from which a fresh fit starts; null: from
            random ones.
        text_encoder: "bytes" (small, learnt with the generator, reads 96 bytes), or hub id or folder of an encoder of
            transformers, or of a pipeline of diffusers that has one.
        rotary_rate: rotary positions per second; null: the video's latents per second, fps / 4 for a VAE that
            compresses time by 4; with `init_from` Wan's, 4.
        lr: peak learning rate, reached after `warmup_steps`, then falling by a cosine to 0 at trainer.max_steps.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: AdamW's, not on biases and norms.
        ema_decay: of the EMA twin, which validates and samples.
        compressor_steps: step by which a learnt compressor's learning rate has fallen to 0; there its statistics are
            measured anew and it is frozen.
        kl_weight: weight of the compressor's KL to N(0, 1), summed over channels, mean over tokens.
        prompt_dropout: share of training prompts replaced by the empty one, for guidance.
        guidance_scale: classifier-free guidance on the prompt at sampling; 1 is none.
        sampling_steps: Euler steps from noise to data.
        compile_blocks: whether a fit compiles the transformer's blocks by torch.compile: minutes at its start.
        checkpoint_blocks: whether training keeps each block's input alone and runs the block again in the backward
            pass: less memory, more time.
        keep_attention: whether, with checkpoint_blocks, the output of self-attention is kept too and not computed
            again: faster, for the memory of one more input for each block.
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
        compile_blocks: bool = False,
        checkpoint_blocks: bool = False,
        keep_attention: bool = True,
    ):
        super().__init__()
        self.clip, self.size, self.init_from, self.rotary_rate = clip, size_of(size), init_from, rotary_rate
        self.lr, self.warmup_steps, self.weight_decay, self.ema_decay = lr, warmup_steps, weight_decay, ema_decay
        self.kl_weight, self.prompt_dropout = kl_weight, prompt_dropout
        self.guidance_scale, self.sampling_steps = guidance_scale, sampling_steps
        self.compile_blocks, self.checkpoint_blocks = compile_blocks, checkpoint_blocks
        self.keep_attention = keep_attention
        self.compressor_steps = compressor_steps if semantic_dim is not None else 0  # nothing to learn without d
        self.space = None
        if encoder != "none":
            run = None if compressor == "learn" else compressor
            self.space = SemanticSpace(clip, encoder, encoder_options or {}, semantic_dim, run)
        self.learns_compressor = self.space is not None and compressor == "learn"
        self.frozen = FrozenParts(clip, self.space, encode_semantics, text_encoder)
        self.bands, self.adherence = TimeBands(), Adherence()
        self.channel_statistics = ChannelStatistics(self.space.channels) if self.learns_compressor else None

    def build_generator(
        self,
        channels: int,
        patch: tuple[int, int, int],
        semantic_dim: int | None = None,
        window_seconds: float | None = None,
        absolute_time: bool = False,
    ) -> None:
        """Makes the generator of things with that many channels, and its EMA twin."""
        text = self.text
        rotary_rate = self.rotary_rate or (LATENTS_PER_SECOND if self.init_from else self.clip.fps / self.time_stride)
        transformer = VideoTransformer(
            channels, text.dim, self.size, patch, semantic_dim, rotary_rate, window_seconds, self.checkpoint_blocks,
            absolute_time, self.keep_attention,
        )  # fmt: skip
        self.generator = GeneratorNetwork(text if text.learnt else nn.Identity(), transformer)
        self.ema = deepcopy(self.generator).requires_grad_(False)

    @property
    def text(self) -> ByteTextEncoder | FrozenTextEncoder:
        return self.frozen.text

    def setup(self, stage: str) -> None:
        self.frozen.to(self.device)
        if stage == "fit" and self.compile_blocks:
            for network in (self.generator, self.ema):
                network.transformer.compile(dynamic=False)
        if stage == "fit" or self.trainer.ckpt_path:
            self.load_compressor()
        if stage == "fit" and self.init_from and not self.trainer.ckpt_path:
            load_wan(self.generator.transformer, self.init_from)
            self.ema.load_state_dict(self.generator.state_dict())

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # under fsdp2
            shard(self)

    def load_compressor(self) -> None:
        """A frozen compressor's weights, from the checkpoint that this stage starts from or the run that learnt it."""
        if self.space is not None and self.space.run:
            self.space.load_compressor(self.trainer.ckpt_path or self.space.run)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stage":
        """Only the generator's dtype follows trainer.precision: averages and statistics would drown in bfloat16."""

        def same_dtype(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for child in self.children():
            child._apply(function if child is self.generator else same_dtype)
        return super()._apply(same_dtype, recurse=False)

    # Clips of other shapes

    def seconds_of(self, clip: Clip) -> tuple[float, ...]:
        raise NotImplementedError

    def shift_of(self, clip: Clip) -> float:
        raise NotImplementedError

    def check_clip(self, clip: Clip) -> None:
        """UserError for a clip that this stage cannot be trained on."""
        if self.space is not None:
            self.space.grid_of(clip)

    def clip_of(self, batch: dict) -> Clip:
        """The clip that a batch holds: the nominal one, unless it says a shape (num_frames, height, width)."""
        if "shape" not in batch:
            return self.clip
        num_frames, height, width = batch["shape"][0]
        return replace(self.clip, num_frames=num_frames, height=height, width=width)

    # Encoded shards

    @property
    def needs_video(self) -> bool:
        """Whether frames at the full rate are needed, or those of the semantic stream will do."""
        return self.frozen.needs_video

    def encode(self, batch: dict, *only: str) -> dict[str, Tensor | list[Tensor]]:
        """What `FrozenParts.encode` says of a batch of clips, on the trainer's device."""
        device = self.trainer.strategy.root_device
        self.frozen.to(device)
        if self.frozen.encode_semantics:
            self.space.to(device)
        return self.frozen.encode(move_data_to_device(batch, device), *only)

    # Learning

    def flow_loss(
        self,
        network: GeneratorNetwork,
        z_0: Tensor,
        batch: dict,
        t: Tensor,
        prompt: Tensor,
        semantics: SemanticTokens | None,
    ) -> Tensor:
        """Squared error of the velocity of each sample (B,), at times t (B,)."""
        eps = random_numbers.normal(batch["key"], "noise", *z_0.shape[1:])
        v = network(flow.interpolate(z_0, eps, t), t, prompt, self.seconds_of(self.clip_of(batch)), semantics)
        return (v.float() - flow.velocity(z_0, eps)).square().flatten(1).mean(1)

    def prompt(self, batch: dict, dropout: float = 0.0) -> Tensor:
        """What the generator is prompted with (B, …), from the batch or by the text encoder; a share are empty."""
        dropped = (random_numbers.uniform(batch["key"], "prompt dropout") < dropout).tolist()
        if "text" in batch and not self.text.learnt:
            rows = zip(dropped, batch["text"], strict=True)
            return self.text.pad([self.text.empty if drop else text for drop, text in rows])
        return self.text.prepare(["" if drop else c for drop, c in zip(dropped, batch["caption"], strict=True)])

    def losses(self, batch: dict, t: Tensor, prompt: Tensor) -> dict[str, Tensor]:
        """Of a training step at times t (B,): the flow loss (B,) and, of a compressor that is learnt, scalars."""
        raise NotImplementedError

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """What is minimised, a scalar."""
        return sum((self.kl_weight if name == "kl" else 1) * loss.mean() for name, loss in losses.items())

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """The loss at random times, with dropped prompts; that of the flow enters its curves."""
        t = flow.logit_normal(random_numbers.normal(batch["key"], "time"), self.shift_of(self.clip_of(batch)))
        losses = self.losses(batch, t, self.prompt(batch, self.prompt_dropout))
        self.bands.update(losses["flow_loss"], t)
        self.log_train(**{name: loss for name, loss in losses.items() if name != "flow_loss"})
        return self.total(losses)

    def validation_times(self, batch: dict) -> Tensor:
        """Fixed times (B,) that fill the training distribution evenly, whatever the number of samples."""
        quantile = (0.5 + batch["position"].double() * (math.sqrt(5) - 1) / 2) % 1
        return flow.logit_normal(torch.special.ndtri(quantile), self.shift).float()

    def validation_semantics(self, batch: dict) -> Tensor:
        """z_sem (B, T', H', W', d), which enter the channels' statistics while this run learns the compressor."""
        z_sem, posterior = self.space.sample(batch)
        if self.channel_statistics is not None:
            self.channel_statistics.update(z_sem, posterior.kl)
        return z_sem

    def kl(self, posterior: Posterior) -> Tensor:
        """The compressor's KL, a scalar; its samples enter the running statistics until it is frozen."""
        if self.global_step < self.compressor_steps:
            self.space.compressor.standardise.observe(posterior.z)
        return posterior.kl.sum(-1).mean()

    def on_train_start(self) -> None:
        self._measured = False

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        if self.learns_compressor and self.global_step == self.compressor_steps and not self._measured:
            data = self.trainer.datamodule
            share = data.batch_size * self.trainer.world_size
            stream = data.stream(lambda: data.delivered - share)  # from the batch at hand
            batches = (move_data_to_device(batch, self.device) for batch in stream)
            self.space.measure(batches, len(stream.dataset.clips), share)
            self._measured = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if is_reported(self.trainer, self.global_step + 1):  # others would not be seen
            self.log_train(gradient_norm=total_norm(self.generator.parameters(), self.trainer.strategy.model))
        if self.learns_compressor and self.global_step < self.compressor_steps:
            self.space.compressor.standardise.update()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        model = self.trainer.strategy.model
        if gradient_clip_val and gradient_clip_algorithm != "value" and isinstance(model, FullyShardedDataParallel):
            model.clip_grad_norm_(gradient_clip_val)  # Lightning leaves it to us
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        decay = min(self.ema_decay, (1 + self.global_step) / (10 + self.global_step))  # a short memory at first
        with torch.no_grad():
            averages = list(self.ema.parameters())
            latest = [p.to(a.dtype) for p, a in zip(self.generator.parameters(), averages, strict=True)]
            torch._foreach_lerp_(averages, latest, 1 - decay)

    def configure_optimizers(self) -> dict:
        if (steps := self.trainer.max_steps) <= 0:
            raise UserError("How long? Set trainer.max_steps: the learning rate falls to 0 there.")
        if self.learns_compressor and steps <= self.compressor_steps:
            raise UserError(
                f"trainer.max_steps {steps} ends before the compressor is frozen: model.compressor_steps,"
                f" {self.compressor_steps}, must be less."
            )
        trained = list(self.generator.named_parameters())
        known = {parameter for _, parameter in trained}
        others = [p for p in self.parameters() if p.requires_grad and p not in known]  # the compressor, and its teacher
        return adamw(trained, others, self.lr, self.weight_decay, self.warmup_steps, steps, self.compressor_steps)

    def on_train_batch_end(self, outputs, batch: dict, batch_idx: int) -> None:
        if not reports(self.trainer, batch_idx):
            return
        rates = self.lr_schedulers().get_last_lr()
        self.log_train(learning_rate=rates[0])
        if len(rates) == 3:
            self.log_train(compressor_learning_rate=rates[2])
        self.log_train(**{f"flow_loss {band}".strip(): mean for band, mean in self.flow_losses().items()})
        self.bands.reset()

    def flow_losses(self) -> dict[str, Tensor]:
        """Those since the last report, of all ranks, by band of t; UserError where one of them was not finite."""
        losses = self.bands.compute()
        if not losses[""].isfinite():
            raise UserError(
                f"The training loss was not finite in the steps up to {self.global_step}: lower model.lr or set"
                " trainer.gradient_clip_val, and go on from the last checkpoint with --ckpt_path last."
            )
        return losses

    def log_train(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name == "flow_loss", batch_size=1)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self.bands.update_called:
            self.flow_losses()  # a run that has diverged does not overwrite its last checkpoint
        frozen = not self.learns_compressor or self.global_step > self.compressor_steps
        checkpoint["fingerprint"] = self.frozen.fingerprint()
        checkpoint["semantics"] = {"encoder": "none"} if self.space is None else self.space.facts | {"frozen": frozen}
        # The sharded strategies name what is in the optimiser themselves.
        if "optimizer_states" in checkpoint and self.trainer.strategy.lightning_restore_optimizer:
            states = zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [named(state, optimizer, self) for state, optimizer in states]

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """UserError where the frozen parts are not those that the run was trained with."""
        found = checkpoint.get("fingerprint", {})
        for name, value in self.frozen.fingerprint().items():
            if name.endswith("_weights") and found.get(name) != value:
                raise UserError(
                    f"The checkpoint was trained with {name} {found.get(name)}, here they are {value}: give"
                    " the weights it was trained with, or train it again."
                )

    # Sampling

    @torch.no_grad()
    def sample(
        self, shape: tuple[int, ...], captions: list[str], keys: Tensor, semantics: SemanticTokens | None, without: list
    ) -> Tensor:
        """Generates (B, *shape) with the EMA twin.

        `without` lists guidance as (captions, semantics, scale): conditions to be moved away from.
        """
        network = self.ema
        conditions = [(network.text(self.text.prepare(c)), s) for c, s, _ in [(captions, semantics, 1.0), *without]]

        def predict(z: Tensor, t: Tensor) -> Tensor:
            v, *others = [network.transformer(z, t, text, self.seconds, s) for text, s in conditions]
            return flow.guide(v, *zip(others, [scale for *_, scale in without], strict=True))

        noise = random_numbers.normal(keys, type(self).__name__, *shape)
        return flow.euler(predict, noise, flow.sampling_times(self.sampling_steps, self.shift))

    @cached_property
    def partner(self) -> "Stage":
        """The other stage, from its run; UserError where there is none or its semantics are of another space."""
        if self.partner_run is None:
            raise UserError(
                f"{type(self).__name__} makes videos together with another run: name it as {self.partner_option}."
            )
        partner = load_stage(self.partner_run)
        self.space.check_same(partner.space, self.partner_run)
        partner.generator = None  # the twin samples
        partner.frozen.share(self.frozen)
        partner.to(self.device)
        partner.frozen.to(self.device)
        return partner

    def can_make_videos(self) -> bool:
        return self.partner_run is not None and is_checkpoint(Path(self.partner_run) / LAST)

    def videos(self, captions: list[str], keys: Tensor) -> list[LatentVideo]:
        """Videos for prompts; each depends on its prompt and key alone."""
        raise NotImplementedError

    def reference_semantics(self, batch: dict) -> Tensor:
        """z_sem (B, T', H', W', d) of reference videos; row b depends on its video and key alone."""
        if self.space is None:
            raise UserError("A reference is followed through its semantics, and a run with encoder none has none.")
        return self.space(batch)

    def test_step(self, batch: dict, batch_idx: int) -> dict[str, list[LatentVideo]]:
        return {"videos": self.videos(batch["caption"], batch["key"])}

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.adherence.compute().items()})


def reports(trainer: Trainer, batch_idx: int) -> bool:
    """Whether Lightning writes to its loggers at this batch."""
    ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return ends_step and is_reported(trainer, trainer.global_step)


def is_reported(trainer: Trainer, step: int) -> bool:
    """Whether Lightning writes to its loggers after that many optimiser steps; it takes 0 for never."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0
