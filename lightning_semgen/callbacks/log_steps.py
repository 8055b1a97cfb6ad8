"""When Lightning writes to its loggers."""

from lightning import Trainer


def logs_after_batch(trainer: Trainer, batch_idx: int) -> bool:
    """Whether it does at the end of this batch, which may be one of several of an optimiser step."""
    ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return ends_step and logs_after_step(trainer, trainer.global_step)


def logs_after_step(trainer: Trainer, step: int) -> bool:
    """Whether it does after that many optimiser steps; trainer.log_every_n_steps 0 is never."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0
