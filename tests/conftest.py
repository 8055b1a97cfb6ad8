"""Toy shards made once, and the command run in this process."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

from data.clip import Clip  # noqa: E402
from data.datamodule import render_toy_world  # noqa: E402
from lightning_semgen.cli import main  # noqa: E402

CONFIGS = Path(__file__).parents[1] / "configs"
CLIP = Clip(49, 48, 48, 24.0, 1.6)
LONG = Clip(241, 48, 48, 4.0, 0.2666667)  # of configs/long.yaml


@pytest.fixture(autouse=True)
def few_clips_are_measured(monkeypatch):
    monkeypatch.setattr("lightning_semgen.semantics.MEASURED_CLIPS", 16)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with few clips in shards/{toy,toy_long}/{train,heldout}-*.tar, where the configs expect them."""
    folder = tmp_path_factory.mktemp("world")
    for split, clips, long_clips in (("train", 40, 8), ("heldout", 16, 4)):
        render_toy_world(str(folder / f"shards/toy/{split}-*.tar"), split, clips, CLIP)
        render_toy_world(str(folder / f"shards/toy_long/{split}-*.tar"), split, long_clips, LONG, scenes=4)
    return folder


def see(shards: Path, folder: Path) -> Path:
    """Has a folder see the session's shards."""
    for path in (shards / "shards").glob("*/*.tar*"):
        link = folder / path.relative_to(shards)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return folder


@pytest.fixture
def workspace(shards, tmp_path, monkeypatch) -> Path:
    """An empty current folder that sees the session's shards."""
    monkeypatch.chdir(see(shards, tmp_path))
    return tmp_path


SMALL = [
    "--data.toy_clips=0", "--data.batch_size=4", "--data.num_workers=0", "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--model.sampling_steps=2",
]  # fmt: skip


@pytest.fixture
def lightning(monkeypatch):
    """Runs the command as a user would, small; returns when it ends, raises SystemExit when it fails."""

    def command(*args: str, small: bool = True) -> None:
        monkeypatch.setattr(sys, "argv", ["lightning", *args, *(SMALL if small else [])])
        main()

    return command


@pytest.fixture
def fails(lightning, capsys):
    """Runs the command, which must fail; returns what it says."""

    def command(*args: str, **options) -> str:
        with pytest.raises(SystemExit) as stop:
            lightning(*args, **options)
        assert stop.value.code not in (0, None)
        return f"{stop.value.code} {capsys.readouterr().err}"

    return command
