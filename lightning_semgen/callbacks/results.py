"""The files that predict and test write."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor

from data.batch import own_rows
from lightning_semgen.evaluation.table import build_metrics
from lightning_semgen.stages.base import Stage
from lightning_semgen.video.generated import GeneratedVideo, LatentVideo, previews
from lightning_semgen.video.pictures import contact_sheet, evenly, file_name

SHOWN = 16  # clips of a contact sheet


class WriteResults(BasePredictionWriter):
    """Writes a file for each prompt to <run>/predict; in test, videos, a contact sheet and numbers to <run>/test."""

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
        self.metrics = build_metrics(stage.device)

    def on_test_batch_end(self, trainer, stage, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        batch, outputs = without_repeated(batch, outputs)
        if not (videos := outputs["videos"]):
            return
        write_videos(Path(trainer.default_root_dir) / "test", videos, batch, stage)
        for metric in self.metrics.values():
            metric.update(previews(videos), batch["info"])
        rows = zip(videos, batch["caption"][: SHOWN - len(self.shown)], strict=False)
        self.shown += [(evenly(video.preview), prompt) for video, prompt in rows]

    def on_test_epoch_end(self, trainer: Trainer, stage: Stage) -> None:
        for metric in self.metrics.values():
            stage.log_dict({f"test/{name}": value for name, value in metric.compute().items()})

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


def without_repeated(batch: dict, made: dict) -> tuple[dict, dict]:
    """The rows of a batch, and their results, that no other rank has."""
    own = own_rows(batch)
    return tuple({name: [values[row] for row in own] for name, values in rows.items()} for rows in (batch, made))


def write_videos(folder: Path, videos: list[LatentVideo], batch: dict, stage: Stage) -> None:
    """Writes mp4 files that carry prompt and seed as metadata."""
    for video, name, prompt, seed in zip(videos, file_names(batch), batch["caption"], batch["seed"], strict=True):
        GeneratedVideo(video, stage.clip.fps, prompt, seed).save(folder / f"{name}.mp4")


def write_semantics(folder: Path, semantics: Tensor, batch: dict, stage: Stage) -> None:
    """Writes safetensors files with `semantics` (T', H', W', d); metadata: prompt, seed, encoder and d."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: json.dumps(value) for name, value in stage.space.facts.items()}
    for z, name, prompt, seed in zip(semantics, file_names(batch), batch["caption"], batch["seed"], strict=True):
        path = folder / f"{name}.safetensors"
        save_file({"semantics": z.contiguous().cpu()}, path, {"prompt": prompt, "seed": str(seed), **facts})


def file_names(batch: dict) -> list[str]:
    """File names from the reference, if there is one, or from the prompt."""
    names = batch.get("reference", batch["caption"])
    return [file_name(*row) for row in zip(batch["number"], names, batch["seed"], strict=True)]
