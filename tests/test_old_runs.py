"""Runs that were trained before the rooms: old_runs/ holds their config.yaml and last.ckpt as that program wrote them.

So that the files are small, each tensor has one value, the mean of what it was; names, shapes and all else are theirs.
"""

import lzma
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

from lightning_semgen.runs import build_stage, load_checkpoint, load_stage

OLD = Path(__file__).parent / "old_runs"
PATHS = {"strategies": ("FSDP", "FSDP2"), "toy_parts": ("ToyEncoderTraining", "ToyVAETraining")}


@pytest.fixture
def runs(workspace) -> Path:
    for run in OLD.iterdir():
        folder = workspace / "runs" / run.name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(run / "config.yaml", folder)
        with lzma.open(run / "last.ckpt.xz") as file:
            checkpoint = torch.load(file, weights_only=True)
        whole = tree_map(lambda x: x.contiguous() if isinstance(x, torch.Tensor) else x, checkpoint)
        torch.save(whole, folder / "checkpoints/last.ckpt")
    return workspace / "runs"


@pytest.mark.parametrize("run", ["dim8", "latent_dim8"])
def test_an_old_run_loads(run, runs):
    assert type(build_stage(OLD / run / "config.yaml")) is type(load_stage(runs / run))


def test_an_old_run_generates_and_goes_on(runs, lightning):
    Path("prompts.txt").write_text("a red circle moves up")
    latent = ("-c", "runs/latent_dim8/config.yaml")
    lightning("predict", *latent, "--model.semantic_run=runs/dim8", "--data.prompts=prompts.txt")
    assert list(Path("runs/latent_dim8/predict").glob("*.mp4"))
    lightning("fit", *latent, "--ckpt_path=last", "--trainer.max_steps=3")
    assert load_checkpoint("runs/latent_dim8")["global_step"] == 3


@pytest.mark.parametrize("module", PATHS)
def test_classes_are_found_by_their_old_paths(module):
    found = __import__(f"lightning_semgen.{module}", fromlist=PATHS[module])
    assert all(isinstance(getattr(found, name), type) for name in PATHS[module])
