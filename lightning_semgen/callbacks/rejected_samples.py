"""Samples that cannot be used: counted by cause, kept by name, and too many of them stop the run."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from data.rejected import RejectionCount
from lightning_semgen.callbacks.log_steps import logs_after_batch
from lightning_semgen.stages.base import Stage


class RejectedSamples(Callback):
    """Logs rejected samples by cause and appends them to <run>/rejected.jsonl; each other rank has its own file.

    Raises UserError, on all ranks at once, where more than the data's `max_bad_share` of the samples seen are rejected.
    """

    def on_train_start(self, trainer: Trainer, stage: Stage) -> None:
        self.count, self.names = RejectionCount(), set()

    def on_train_batch_start(self, trainer: Trainer, stage: Stage, batch: dict, batch_idx: int) -> None:
        rejected = sum(batch.get("rejected", []), [])
        for name, cause in rejected:
            if cause not in self.count.causes:
                rank_zero_warn(f"Sample {name} is skipped: {cause}. Others of this cause are only counted.")
            self.count.add(0, [(name, cause)])
        self.count.add(len(batch["caption"]), [])
        self._keep(trainer, [row for row in rejected if row[0] not in self.names])

    def _keep(self, trainer: Trainer, rows: list[tuple[str, str]]) -> None:
        if not rows:
            return
        self.names |= {name for name, _ in rows}
        rank = f"-rank{trainer.global_rank}" if trainer.global_rank else ""
        with (Path(trainer.default_root_dir) / f"rejected{rank}.jsonl").open("a") as file:
            file.writelines(json.dumps({"sample": name, "cause": cause}) + "\n" for name, cause in rows)

    def on_train_batch_end(self, trainer: Trainer, stage: Stage, outputs, batch: dict, batch_idx: int) -> None:
        if not logs_after_batch(trainer, batch_idx):
            return
        everywhere = self._of_all_ranks(trainer)
        counts = {f"rejected/{cause}": float(count) for cause, count in everywhere.causes.items()}
        stage.log_dict(counts, batch_size=1)
        everywhere.check(trainer.datamodule.max_bad_share)

    def _of_all_ranks(self, trainer: Trainer) -> RejectionCount:
        if trainer.world_size == 1:
            return self.count
        counts_of_ranks = [self.count] * trainer.world_size
        torch.distributed.all_gather_object(counts_of_ranks, self.count)
        return sum(counts_of_ranks, RejectionCount())
