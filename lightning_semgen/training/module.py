"""A LightningModule with a network and its EMA, under every strategy and precision."""

from collections.abc import Callable

import torch
from lightning import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_semgen.model.generator_network import GeneratorNetwork
from lightning_semgen.training.ema import ema_copy, update_ema
from lightning_semgen.training.optimizer import follow_config
from lightning_semgen.training.strategies import by_parameter_name, shard


class TrainedModule(LightningModule):
    """Trains `generator`; `ema`, the average of its weights, validates and samples."""

    ema_decay: float

    def train_network(self, network: GeneratorNetwork) -> None:
        self.generator, self.ema = network, ema_copy(network)

    def compile_networks(self) -> None:
        for network in (self.generator, self.ema):
            network.transformer.compile(dynamic=False)

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # under fsdp2
            shard(self)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainedModule":
        """Only the generator's dtype follows trainer.precision: averages and statistics would drown in bfloat16."""

        def same_dtype(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        for child in self.children():
            child._apply(function if child is self.generator else same_dtype)
        return super()._apply(same_dtype, recurse=False)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        update_ema(self.ema, self.generator, self.ema_decay, self.global_step)

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

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path:
            follow_config(self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        # The sharded strategies name what is in the optimiser themselves.
        if "optimizer_states" in checkpoint and self.trainer.strategy.lightning_restore_optimizer:
            states = zip(checkpoint["optimizer_states"], self.trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [by_parameter_name(state, optimizer, self) for state, optimizer in states]
