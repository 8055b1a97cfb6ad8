"""When Lightning writes to its loggers."""

from lightning import Trainer


def logs_after_batch(trainer: Trainer, batch_idx: int) -> bool:
    """Whether it writes at the end of this batch; an optimiser step may have several batches."""
    ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return ends_step and logs_after_step(trainer, trainer.global_step)


def logs_after_step(trainer: Trainer, step: int) -> bool:
    """Whether it writes after that many optimiser steps; never if trainer.log_every_n_steps is 0."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0
