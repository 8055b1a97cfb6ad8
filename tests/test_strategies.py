"""Several ranks learn what one process learns, under every strategy, and read each other's checkpoints."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SMALL, on_two_ranks, see
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_semgen.cli import main
from lightning_semgen.runs import load_checkpoint

STEPS = 20
FIT = (
    "fit", "-c", f"{CONFIGS}/dim8.yaml", *SMALL, "--trainer.log_every_n_steps=1", "--trainer.gradient_clip_val=0.5",
    "--model.compressor_steps=6", "--model.warmup_steps=5", "--trainer.val_check_interval=10",
)  # fmt: skip


def fit(run: str, batch_size: int, steps: int = STEPS) -> tuple[str, ...]:
    return (*FIT, f"--trainer.default_root_dir={run}", f"--data.batch_size={batch_size}", f"--trainer.max_steps={steps}")


@pytest.fixture(scope="module")
def fitted(shards, tmp_path_factory) -> Path:
    """A folder with a run of one process on batches of 4."""
    folder = see(shards, tmp_path_factory.mktemp("strategies"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_semgen.semantics.MEASURED_CLIPS", 16)
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning", *fit("one", 4)])
        main()
    return folder


@pytest.fixture
def one(fitted, monkeypatch) -> str:
    monkeypatch.chdir(fitted)
    return "one"


def curves(run: str) -> dict[str, list[float]]:
    events = EventAccumulator(run).Reload()
    return {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def check_same(run: str, other: str) -> None:
    first, second = (load_checkpoint(folder) for folder in (run, other))
    assert first["global_step"] == second["global_step"] == STEPS
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        print(name, (second["state_dict"][name].double() - tensor.double()).abs().max().item())
        #torch.testing.assert_close(second["state_dict"][name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_learn_what_one_process_learns(strategy, one):
    on_two_ranks(*fit(strategy, 2), f"--trainer.strategy={strategy}")
    check_same(one, strategy)
    expected, found = curves(one), curves(strategy)
    for name in expected:
        print(name, expected[name][-3:], found[name][-3:])
    assert 0
