"""A run is a folder: config.yaml, checkpoints/, TensorBoard. Where it is, what it holds, how it is written.

A checkpoint is a file or, where each rank saved its share, a folder of torch.distributed.checkpoint.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from data.clip import Clip
from data.datamodule import VideoDataModule
from lightning_semgen.errors import UserError
from lightning_semgen.training.checkpoints import consolidated, is_checkpoint

CONFIG, LAST = "config.yaml", Path("checkpoints") / "last.ckpt"


def run_folder(config: Path) -> Path:
    """Where the run of a config file is: its own folder if it was saved there by a fit, else runs/<its name>."""
    return config.parent if config.name == CONFIG else Path("runs") / config.stem


def last_checkpoint(run: str | Path) -> Path:
    """The last checkpoint of a run; UserError where nothing has been trained there."""
    if not is_checkpoint(path := Path(run) / LAST):
        raise UserError(f"There is no trained run in {run} ({path} is missing): train it with `lightning fit` first.")
    return path


def load_checkpoint(run: str | Path, parts: set[str] | None = None) -> dict[str, Any]:
    """The last checkpoint of a run, or the one at a path, on the CPU.

    With `parts`, "state_dict" or "state_dict.<name>", little more than those is read: of a folder their tensors alone,
    of a file, which nobody may write to meanwhile, each when it is used.
    """
    path = Path(run) if is_checkpoint(Path(run)) else last_checkpoint(run)
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=parts is not None)
    return consolidated(path, parts)


def link_clip(parser: ArgumentParser) -> None:
    """Links the stage's nominal clip to the options of data."""
    for field in fields(Clip):
        parser.link_arguments(f"data.{field.name}", f"model.init_args.clip.{field.name}")


def load_stage(run: str | Path) -> LightningModule:
    """The stage of a run with the weights of its last checkpoint, in eval mode."""
    checkpoint = load_checkpoint(run, {"state_dict"})
    stage = build_stage(Path(run) / CONFIG)
    stage.on_load_checkpoint(checkpoint)
    stage.load_state_dict(checkpoint["state_dict"])
    return stage.eval()


def build_stage(config: Path) -> LightningModule:
    """Builds the stage of a run's config in float32; within a step under bf16-true torch has another default."""
    options = yaml.safe_load(config.read_text())
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_class_arguments(VideoDataModule, "data")
    link_clip(parser)
    options = parser.parse_object({name: options[name] for name in ("model", "data")})
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return parser.instantiate_classes(options).model
    finally:
        torch.set_default_dtype(default)


class RunCheckpoint(ModelCheckpoint):
    """Keeps the last checkpoint of a run, and one at the very end.

    Args:
        every_n_train_steps: optimiser steps between two checkpoints.
    """

    def __init__(self, every_n_train_steps: int = 500):
        super().__init__(
            filename=LAST.stem, every_n_train_steps=every_n_train_steps, save_top_k=1, enable_version_counter=False
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir).absolute() / LAST.parent)
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run and self._last_global_step_saved != trainer.global_step:
            trainer.save_checkpoint(Path(self.dirpath) / LAST.name, weights_only=False)


class SaveRunConfig(SaveConfigCallback):
    """`fit` writes config.yaml into the run folder, without the folder's own name, so that a run can be moved."""

    def __init__(self, parser, config, **options):
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False, **options)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        config = self.config.clone()
        config.trainer.default_root_dir = None
        config.ckpt_path = None
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(config, folder / CONFIG, skip_none=False, overwrite=True)
