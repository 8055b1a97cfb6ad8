"""A picture of references beside what was generated from them."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_semgen.callbacks.results import without_repeated
from lightning_semgen.stages.base import Stage
from lightning_semgen.video.pictures import contact_sheet, evenly

REFERENCES, VARIANTS = 8, 3  # of them, and of each in its row, on theirs


class ReferenceSheet(Callback):
    """In predict with references, writes <run>/predict/contact_sheet.png: each reference beside its first variants."""

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
                row.append((evenly(video.preview), f"seed {seed}: {prompt}".rstrip(": ")))

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
