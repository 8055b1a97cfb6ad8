"""Progress and speed of a run, and what predict and test leave behind."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from shutil import which
from signal import SIGTERM, SIGUSR1, Signals, signal
from socket import gethostname

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import DistError

from lightning_semgen.cost import frozen_flops, step_cost, tokens
from lightning_semgen.errors import UserError
from lightning_semgen.generator import GeneratedVideo
from lightning_semgen.pictures import contact_sheet, evenly, file_name
from lightning_semgen.plan import peak_flops
from lightning_semgen.runs import LAST
from lightning_semgen.stage import Stage, reports
from lightning_semgen.video import Video, glimpses

SHOWN = 16  # clips of a contact sheet
REFERENCES, VARIANTS = 8, 3  # of them, and of each in its row, on theirs
GLOO = re.compile("gloo|pair closure")  # what its errors say, which are RuntimeErrors


class Progress(TQDMProgressBar):
    """Steps done, of trainer.max_steps; there are no epochs to name."""

    def __init__(self):
        super().__init__(refresh_rate=10)

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: Trainer, stage: LightningModule) -> dict[str, float | str]:
        metrics = super().get_metrics(trainer, stage)
        return {name.rpartition("/")[2]: value for name, value in metrics.items() if name != "v_num"}


class Throughput(Callback):
    """Logs how fast a fit goes, what of it is waiting for data, and how much of the device it uses."""

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
        if reports(trainer, batch_idx):
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


class LostRank(Callback):
    """What a collective says at length when another rank has died or is stuck, in one sentence."""

    def on_exception(self, trainer: Trainer, stage: Stage, exception: BaseException) -> None:
        if trainer.world_size > 1 and (isinstance(exception, DistError) or GLOO.search(str(exception))):
            raise UserError(
                f"Rank {trainer.global_rank} of {trainer.world_size}, on {gethostname()}, has lost another one"
                f" ({str(exception).strip().splitlines()[0]}): what that one printed last says why. Go on from the last"
                " checkpoint with --ckpt_path last."
            ) from exception


class WriteResults(BasePredictionWriter):
    """predict: a file for each prompt in <run>/predict; test: videos, a contact sheet and the numbers in <run>/test."""

    def __init__(self):
        super().__init__("batch")

    def write_on_batch_end(self, trainer, stage, prediction, batch_indices, batch, batch_idx, dataloader_idx) -> None:
        folder = Path(trainer.default_root_dir) / "predict"
        batch, prediction = without_repeated(batch, prediction)
        for name, values in prediction.items():
            write = write_videos if name == "videos" else write_semantics
            write(folder, values, batch, stage)
        rank_zero_info(f"{len(batch['caption'])} {name} written to {folder}")

    def on_test_start(self, trainer: Trainer, stage: Stage) -> None:
        self.shown: list[tuple[Tensor, str]] = []

    def on_test_batch_end(self, trainer, stage, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        batch, outputs = without_repeated(batch, outputs)
        if not (videos := outputs["videos"]):
            return
        write_videos(Path(trainer.default_root_dir) / "test", videos, batch, stage)
        stage.adherence.update(glimpses(videos), batch["info"])
        rows = zip(videos, batch["caption"][: SHOWN - len(self.shown)], strict=False)
        self.shown += [(evenly(video.glimpses), prompt) for video, prompt in rows]

    def on_test_end(self, trainer: Trainer, stage: Stage) -> None:
        folder = Path(trainer.default_root_dir) / "test"
        if trainer.is_global_zero and self.shown:
            videos, prompts = zip(*self.shown, strict=True)
            sheet = folder / "contact_sheet.png"
            contact_sheet(torch.stack(videos), prompts).save(sheet)
            numbers = folder / "numbers.json"
            numbers.write_text(
                json.dumps({k: round(v.item(), 4) for k, v in trainer.callback_metrics.items()}, indent=1)
            )
            rank_zero_info(f"Videos: {folder}\nContact sheet: {sheet}\nNumbers: {numbers}")


class ReferenceSheet(Callback):
    """predict with references: <run>/predict/contact_sheet.png, a row for each with its first variants beside it."""

    def on_predict_start(self, trainer: Trainer, stage: Stage) -> None:
        self.rows: dict[str, list[tuple[Tensor, str]]] = {}

    def on_predict_batch_end(self, trainer, stage, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if "reference" not in batch or "videos" not in outputs:
            return
        batch, outputs = without_repeated(batch, outputs)
        names = zip(batch["reference"], batch["caption"], batch["seed"], strict=True)
        for (name, prompt, seed), frames, video in zip(names, batch["frames"], outputs["videos"], strict=True):
            row = self.rows.setdefault(name, [(evenly(frames), f"reference {name}")])
            if len(row) <= VARIANTS:
                row.append((evenly(video.glimpses), f"seed {seed}: {prompt}".rstrip(": ")))

    def on_predict_end(self, trainer: Trainer, stage: Stage) -> None:
        if not trainer.is_global_zero or not self.rows:
            return
        rows = list(self.rows.values())[:REFERENCES]
        columns = max(map(len, rows))
        blank = (torch.full_like(rows[0][0][0], 255), "")  # other ranks have the rest of a row
        videos, labels = zip(*[tile for row in rows for tile in row + [blank] * (columns - len(row))], strict=True)
        sheet = Path(trainer.default_root_dir) / "predict" / "contact_sheet.png"
        contact_sheet(torch.stack(videos), labels, columns=columns).save(sheet)
        rank_zero_info(f"References beside their variants: {sheet}")


def without_repeated(batch: dict, made: dict) -> tuple[dict, dict]:
    """The rows of a batch and what was made of them, but for those that are another rank's too."""
    own = [row for row, repeated in enumerate(batch["repeated"]) if not repeated]
    return tuple({name: [values[row] for row in own] for name, values in rows.items()} for rows in (batch, made))


def write_videos(folder: Path, videos: list[Video], batch: dict, stage: Stage) -> None:
    """mp4 files that carry prompt and seed."""
    for video, name, prompt, seed in zip(videos, file_names(batch), batch["caption"], batch["seed"], strict=True):
        GeneratedVideo(video, stage.clip.fps, prompt, seed).save(folder / f"{name}.mp4")


def write_semantics(folder: Path, semantics: Tensor, batch: dict, stage: Stage) -> None:
    """safetensors files with `semantics` (T', H', W', d) that carry prompt, seed and what the space is."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: json.dumps(value) for name, value in stage.space.facts.items()}
    for z, name, prompt, seed in zip(semantics, file_names(batch), batch["caption"], batch["seed"], strict=True):
        path = folder / f"{name}.safetensors"
        save_file({"semantics": z.contiguous().cpu()}, path, {"prompt": prompt, "seed": str(seed), **facts})


def file_names(batch: dict) -> list[str]:
    """After the reference, where there is one, or the prompt."""
    names = batch.get("reference", batch["caption"])
    return [file_name(*row) for row in zip(batch["number"], names, batch["seed"], strict=True)]
