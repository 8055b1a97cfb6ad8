"""The curves of training: losses, the flow loss in bands of t, learning rates, the gradients' norm."""

import torch
from lightning import Callback, Trainer
from torch import Tensor

from lightning_semgen.callbacks.log_steps import logs_after_batch, logs_after_step
from lightning_semgen.errors import UserError
from lightning_semgen.evaluation.flow_loss_bands import FlowLossBands
from lightning_semgen.stages.base import Stage
from lightning_semgen.training.checkpoints import check_finite
from lightning_semgen.training.strategies import total_norm


class LossCurves(Callback):
    """Logs what `Stage.training_step` returns; a loss or weight that is not finite stops the fit before it is saved."""

    def on_train_start(self, trainer: Trainer, stage: Stage) -> None:
        self.bands = FlowLossBands().to(stage.device)

    def on_before_optimizer_step(self, trainer: Trainer, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(stage, Stage) or not logs_after_step(trainer, trainer.global_step + 1):
            return  # others would not be seen
        rates = [group["lr"] for group in optimizer.param_groups]  # before the scheduler moves on to the next step
        log(stage, learning_rate=rates[0])
        if len(rates) == 3:
            log(stage, compressor_learning_rate=rates[2])
        log(stage, gradient_norm=total_norm(stage.generator.parameters(), trainer.strategy.model))

    def on_train_batch_end(self, trainer: Trainer, stage: Stage, outputs: dict, batch: dict, batch_idx: int) -> None:
        if not isinstance(stage, Stage):
            return
        self.bands.update(outputs["flow_loss"], outputs["t"])
        log(stage, **{name: outputs[name] for name in outputs.keys() - {"loss", "t", "flow_loss"}})
        if logs_after_batch(trainer, batch_idx):
            means = self.finite_means(trainer)
            log(stage, **{f"flow_loss {band}".strip(): mean for band, mean in means.items()})
            self.bands.reset()

    def on_save_checkpoint(self, trainer: Trainer, stage: Stage, checkpoint: dict) -> None:
        if isinstance(stage, Stage) and self.bands.update_called:
            self.finite_means(trainer)  # a run that has diverged does not overwrite its last checkpoint
        check_finite(stage)  # the loss is of the weights before the step

    def finite_means(self, trainer: Trainer) -> dict[str, Tensor]:
        """Means since the last report, over all ranks, by band of t; UserError if a loss was not finite."""
        means = self.bands.compute()
        if not means[""].isfinite():
            raise UserError(
                f"The training loss was not finite in the steps up to {trainer.global_step}: lower model.lr or set"
                " trainer.gradient_clip_val, and go on from the last checkpoint with --ckpt_path last."
            )
        return means


def log(stage: Stage, **values: Tensor | float) -> None:
    for name, value in values.items():
        stage.log(f"train/{name}", value, prog_bar=name == "flow_loss", batch_size=1)
