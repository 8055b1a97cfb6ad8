"""Signals that save a run and end it."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which
from signal import SIGTERM, SIGUSR1, Signals, signal

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_semgen.runs import LAST
from lightning_semgen.stages.base import Stage


class StopOnSignal(Callback):
    """SIGUSR1 or SIGTERM to any rank: after the step at hand all save the run together and end.

    SIGUSR1 is "go on later": a SLURM job is put back in its queue, and the exit code is 75. SIGTERM is "stop": 143.
    """

    def setup(self, trainer: Trainer, pl_module: Stage, stage: str) -> None:
        self.asked = 0
        if stage == "fit":
            signal(SIGUSR1, self._ask)  # before Lightning's, and for the loader's processes too, which SLURM also tells

    def on_train_start(self, trainer: Trainer, pl_module: Stage) -> None:
        # In place of Lightning's handler, which talks to the other ranks in the middle of whatever they do.
        signal(SIGTERM, self._ask)

    def _ask(self, number: int, _) -> None:
        self.asked = max(self.asked, number)

    def on_train_batch_end(self, trainer: Trainer, stage: Stage, outputs, batch: dict, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        asked = self.asked
        if trainer.world_size > 1:
            asked = torch.tensor(asked, device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if not asked:
            return
        trainer.save_checkpoint(Path(trainer.default_root_dir) / LAST, weights_only=False)
        name = Signals(asked).name
        rank_zero_info(f"Stopped by {name} at step {trainer.global_step}: go on with --ckpt_path last.")
        if asked == SIGTERM:
            sys.exit(128 + SIGTERM)
        if trainer.is_global_zero and SLURMEnvironment.detect() and which("scontrol"):
            requeue()
        sys.exit(os.EX_TEMPFAIL)


def requeue() -> None:
    """Puts this SLURM job back in its queue; of an array, this task alone."""
    array = [os.environ[name] for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID") if name in os.environ]
    subprocess.run(["scontrol", "requeue", "_".join(array) or os.environ["SLURM_JOB_ID"]], check=False)
