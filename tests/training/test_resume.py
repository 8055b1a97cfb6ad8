"""A run killed at any moment goes on to the weights of one that was never killed, on as many ranks as before or not."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS

STEPS = 60


def fit(folder: str, *args: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "lightning_semgen", "fit", "-c", f"{CONFIGS}/dim8.yaml", "--data.toy_clips=0",
        "--data.batch_size=4", "--data.num_workers=2", f"--trainer.max_steps={STEPS}", "--model.compressor_steps=30",
        "--checkpoint.every_n_train_steps=5", "--trainer.val_check_interval=20", "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}", *args,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def kill_after_checkpoints(process: subprocess.Popen, checkpoint: Path, count: int, delay: float) -> None:
    """SIGKILL, workers too, `delay` seconds after the checkpoint has been written `count` times."""
    seen, written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0, 0
    while written < count:
        assert process.poll() is None, "the run ended before it could be killed"
        now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else seen
        written, seen = written + (now != seen), now
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_at_random(phases: Iterable[tuple[str, ...]], seed: int) -> dict:
    """Begins and kills the run `broken` with each phase's options but the last's, and returns its last checkpoint."""
    dice, checkpoint = random.Random(seed), Path("broken/checkpoints/last.ckpt")
    *killed, last = phases
    for number, options in enumerate(killed):
        process = fit("broken", *options, *(["--ckpt_path=last"] if number else []))
        kill_after_checkpoints(process, checkpoint, dice.randint(1, 3), dice.uniform(0, 0.15))
    assert torch.load(checkpoint)["global_step"] < STEPS
    assert fit("broken", *last, "--ckpt_path=last").wait() == 0
    return torch.load(checkpoint)


@pytest.mark.slow
def test_killed_three_times_and_resumed_is_bit_for_bit_the_unbroken_run(workspace):
    assert fit("unbroken").wait() == 0
    one, two = torch.load("unbroken/checkpoints/last.ckpt"), kill_at_random([()] * 4, seed=0)
    assert one["global_step"] == two["global_step"] == STEPS
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    assert one["VideoDataModule"] == two["VideoDataModule"] == {"delivered": 4 * STEPS}


@pytest.mark.slow
def test_killed_on_two_ranks_and_on_one_it_saw_every_sample_in_its_place(workspace):
    exact = ("--trainer.precision=64-true",)
    two_ranks = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2")
    assert fit("unbroken", *exact).wait() == 0
    phases = [exact + two_ranks, exact, exact + two_ranks]
    one, two = torch.load("unbroken/checkpoints/last.ckpt"), kill_at_random(phases, seed=1)
    assert one["global_step"] == two["global_step"] == STEPS
    assert one["VideoDataModule"] == two["VideoDataModule"] == {"delivered": 4 * STEPS}
    for name, value in one["state_dict"].items():  # another sample, crop or noise would show here
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-5, atol=1e-5, msg=name)
