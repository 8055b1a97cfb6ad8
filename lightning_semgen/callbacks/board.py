"""A run in TensorBoard: its events, and its row in the table that compares runs."""

from collections.abc import Mapping

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_semgen.evaluation.table import COMPARED
from lightning_semgen.model.sizes import SIZES
from lightning_semgen.stages.base import Stage

CURVES = ("train/flow_loss", "val/flow_loss", "val/semantic_gap", *COMPARED)


class RunLogger(TensorBoardLogger):
    """Writes events into `folder` itself, without Lightning's curve of epochs: training has no epochs."""

    def __init__(self, folder: str, purge_step: int):
        super().__init__(folder, name="", version="", purge_step=purge_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    def save(self) -> None:
        """Flushes; Lightning's own would leave an empty hparams.yaml beside config.yaml."""
        self.experiment.flush()


class CountSteps(Callback):
    """Puts the points of curves at optimiser steps. After a resume with accumulation Lightning counts one too many."""

    def on_train_batch_start(self, trainer: Trainer, *_) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class CompareRuns(Callback):
    """A row of TensorBoard's HParams: what sets the run apart, and the latest value of each of `CURVES`.

    All rows name the same columns, as TensorBoard takes those of one run for all.
    """

    def on_train_start(self, trainer: Trainer, stage: Stage) -> None:
        if isinstance(stage, Stage):
            experiment, start, self.end = hparams(facts(trainer, stage), dict.fromkeys(CURVES))
            self._write(trainer, experiment, start)

    def on_train_end(self, trainer: Trainer, stage: Stage) -> None:
        if isinstance(stage, Stage):
            self._write(trainer, self.end)

    def _write(self, trainer: Trainer, *summaries) -> None:
        for writer in writers(trainer):
            for summary in summaries:
                writer._get_file_writer().add_summary(summary)


def facts(trainer: Trainer, stage: Stage) -> dict[str, str | float]:
    """The hyperparameters that matter. They are few: TensorBoard shows the first five in alphabetical order.

    `semantic_dim` is D without compression and 0 without an encoder, `batch_size` that of an optimiser step.
    """
    data, space = trainer.datamodule, stage.space
    return {
        "stage": type(stage).__name__,
        "encoder": "none" if space is None else space.source["encoder"],
        "semantic_dim": 0 if space is None else space.channels,
        "size": next(name for name, size in SIZES.items() if size == stage.size),
        "kl_weight": stage.kl_weight,
        "lr": stage.lr,
        "batch_size": data.batch_size * trainer.world_size * trainer.accumulate_grad_batches,
        "steps": trainer.max_steps,
    }


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """The writers of the TensorBoard loggers; only the first rank has any."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
