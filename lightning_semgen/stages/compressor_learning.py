"""How a compressor is learnt beside a generator: learn, measure its statistics anew, freeze."""

import torch
from lightning import Callback, Trainer
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_semgen.errors import UserError
from lightning_semgen.model.compressor import Posterior
from lightning_semgen.stages.semantic_space import SemanticSpace


class CompressorLearning(Callback):
    """Until optimiser step `steps` the compressor learns and its samples enter the running statistics.

    There its learning rate has fallen to 0 (`training.optimizer`), and the statistics are measured anew over the
    training clips: those of a compressor that still changed would be of many compressors. From there it is frozen.
    """

    def __init__(self, space: SemanticSpace, steps: int):
        self.space, self.steps, self.measured = space, steps, False

    def kl(self, posterior: Posterior, step: int) -> Tensor:
        """KL to N(0, 1), summed over channels, mean over tokens; the sample enters the statistics of the step."""
        if step < self.steps:
            self.space.compressor.standardise.observe(posterior.z)
        return posterior.kl.sum(-1).mean()

    def check(self, max_steps: int) -> None:
        """UserError where a fit of that many steps ends before the compressor is frozen."""
        if max_steps <= self.steps:
            raise UserError(
                f"trainer.max_steps {max_steps} ends before the compressor is frozen: model.compressor_steps,"
                f" {self.steps}, must be less."
            )

    def on_train_start(self, trainer: Trainer, *_) -> None:
        self.measured = False  # a resumed fit that stopped right there measures again, and finds the same

    def on_train_batch_start(self, trainer: Trainer, stage, batch: dict, batch_idx: int) -> None:
        if trainer.global_step != self.steps or self.measured:
            return
        data = trainer.datamodule
        share = data.batch_size * trainer.world_size
        stream = data.stream(lambda: data.delivered - share)  # from the batch at hand
        batches = (move_data_to_device(batch, stage.device) for batch in stream)
        self.space.measure(batches, len(stream.dataset.clips), share)
        self.measured = True

    def on_before_optimizer_step(self, trainer: Trainer, stage, optimizer: torch.optim.Optimizer) -> None:
        if trainer.global_step < self.steps:
            self.space.compressor.standardise.update()
            return
        for parameter in stage.compressor_parameters():
            parameter.grad = None  # it is frozen: clipping by norm must not count it
