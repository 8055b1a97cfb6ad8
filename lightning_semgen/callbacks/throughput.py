"""How fast a fit goes."""

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_semgen.callbacks.log_steps import logs_after_batch
from lightning_semgen.cost import frozen_flops, step_cost, tokens
from lightning_semgen.hardware import peak_flops
from lightning_semgen.stages.base import Stage


class Throughput(Callback):
    """Logs the speed of a fit, the share of time that it waits for data, MFU and memory."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.peak, self.counts, self.costs = peak_flops(trainer.strategy.root_device), {}, {}
        if not isinstance(pl_module, Stage) or stage != "fit":
            return
        for clip in {pl_module.clip, *(trainer.datamodule.buckets or ())}:  # now, before weights are sharded
            self.counts[clip] = sum(count for kind, count in tokens(pl_module, clip).items() if kind != "text")
            if self.peak is not None:
                self.costs[clip] = step_cost(pl_module, clip=clip).flops, frozen_flops(pl_module, clip)

    def on_train_start(self, trainer: Trainer, stage: Stage) -> None:
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self.since = self.last = time.perf_counter()
        self.step, self.clips, self.waited, self.tokens, self.flops = trainer.global_step, 0, 0.0, 0, 0

    def on_train_batch_start(self, trainer: Trainer, stage: Stage, batch: dict, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.last

    def on_train_batch_end(self, trainer: Trainer, stage: Stage, outputs, batch: dict, batch_idx: int) -> None:
        self._count(stage, batch, len(batch["caption"]) * trainer.world_size)
        self.last = time.perf_counter()
        if logs_after_batch(trainer, batch_idx):
            values = {f"speed/{name}": value for name, value in self._measured(trainer).items()}
            stage.log_dict(values, batch_size=1, prog_bar=True)
            self._begin(trainer)

    def _count(self, stage: Stage, batch: dict, clips: int) -> None:
        self.clips += clips
        if self.counts:
            self.tokens += clips * self.counts[stage.clip_of(batch)]
        if self.costs:
            step, frozen = self.costs[stage.clip_of(batch)]
            videos = batch.keys() & {"frames", "semantic_frames"}  # encoded clips have none
            self.flops += clips * (step + (frozen if videos else 0))

    def _measured(self, trainer: Trainer) -> dict[str, float]:
        elapsed, device = self.last - self.since, trainer.strategy.root_device
        values = {
            "clips_per_second": self.clips / elapsed,
            "step_seconds": elapsed / max(1, trainer.global_step - self.step),
            "data_wait_share": self.waited / elapsed,
        }
        if self.tokens:
            values["tokens_per_second"] = self.tokens / elapsed
        if self.flops:
            values["mfu"] = self.flops / (elapsed * self.peak * trainer.world_size)
        if device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        return values

    def on_validation_end(self, trainer: Trainer, stage: Stage) -> None:
        if not trainer.sanity_checking:
            self._begin(trainer)  # validation is neither work nor waiting for data
