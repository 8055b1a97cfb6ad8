"""A run is a folder: config.yaml, checkpoints/, TensorBoard. Where it is, what it holds, how it is written.

A checkpoint is a file or, where each rank saved its share, a folder of torch.distributed.checkpoint.
"""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from data.clip import Clip
from data.datamodule import VideoDataModule
from lightning_semgen.errors import UserError

CONFIG, LAST = "config.yaml", Path("checkpoints") / "last.ckpt"
FACTS = "meta.pt"  # of a folder: what Lightning puts beside weights and optimiser


def run_folder(config: Path) -> Path:
    """Where the run of a config file is: its own folder if it was saved there by a fit, else runs/<its name>."""
    return config.parent if config.name == CONFIG else Path("runs") / config.stem


def is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path / FACTS).is_file()


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


def consolidated(folder: Path, parts: set[str] | None = None) -> dict[str, Any]:
    """A checkpoint that is a folder, as if it had been one file."""
    found: dict[str, Any] = {}
    names = parts and parts | {"model" + part.removeprefix("state_dict") for part in parts}  # as under fsdp
    planner = _EmptyStateDictLoadPlanner(keys=names)
    _load_state_dict(found, FileSystemReader(folder), planner=planner, no_dist=True)
    found["state_dict"] = found.pop("state_dict", None) or found.pop("model", {})
    optimizers = [found.pop(name) for name in sorted(found) if name.startswith("optimizer_")]
    return checkpoint_facts(folder) | found | ({"optimizer_states": optimizers} if optimizers else {})


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside weights and optimiser; those of a file come as tensors without content."""
    if path.is_dir():
        return torch.load(path / FACTS, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="meta", weights_only=True)


def link_clip(parser: ArgumentParser) -> None:
    """The stage's nominal clip is what the data says, in training and wherever a stage is loaded."""
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
    """The stage of a run's config, in float32 wherever it is asked for: steps under bf16-true have another default."""
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


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint is whole or not there: written beside its place, then renamed. Folders are read too."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, partial(path), storage_options)
        replace(path)

    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict[str, Any]:
        if Path(path).is_dir():
            return consolidated(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def partial(path: str | Path) -> Path:
    """Where the checkpoint of that path is written to."""
    return Path(path).with_name(Path(path).name + ".partial")


def replace(path: str | Path) -> None:
    """Puts what was written in its place; where a folder comes or goes, what was there is first moved aside."""
    path = Path(path)
    if partial(path).is_file() and not path.is_dir():
        partial(path).replace(path)
        return
    before = path.with_name(path.name + ".before")
    remove(before)
    if path.exists():
        path.rename(before)
    partial(path).rename(path)
    remove(before)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
