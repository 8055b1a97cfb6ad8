"""What a run on many ranks meets on a cluster: signals, ranks that die, checkpoints in pieces, bfloat16."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SMALL, on_two_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_semgen.runs import load_checkpoint


def fit(run: str, steps: int, *args: str, config: str = "dim8") -> list[str]:
    """To that many steps, of which the first 4 learn the compressor; resumes what is there."""
    resume = ["--ckpt_path=last"] if Path(run).exists() else []
    return [
        "fit", "-c", f"{CONFIGS}/{config}.yaml", *SMALL, "--data.batch_size=2", "--trainer.log_every_n_steps=1",
        "--model.compressor_steps=4", "--model.warmup_steps=5", f"--trainer.default_root_dir={run}",
        f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", *resume, *args,
    ]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_make_videos_with_weights_in_bfloat16(workspace):
    options = ("--trainer.strategy=fsdp2", "--trainer.precision=bf16-true")
    on_two_ranks(*fit("semantic", 6, *options))
    learnt = ("--model.compressor=semantic", "--data.encoded=null")
    on_two_ranks(*fit("latent", 3, *learnt, *options, config="latent_dim8"))
    state = load_checkpoint("latent")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert state["generator.transformer.proj_out.weight"].dtype == torch.bfloat16
    assert state["ema.transformer.proj_out.weight"].dtype == torch.float32
    assert state["space.compressor.standardise.var"].dtype == torch.float32
    assert "gallery/videos" in EventAccumulator("latent").Reload().Tags()["images"]
    on_two_ranks("test", "-c", "latent/config.yaml", *SMALL, *options, "--trainer.limit_test_batches=1")
    assert len(list(Path("latent", "test").glob("*.mp4"))) == 8  # a batch of 4 on each rank


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """A command in a process group of its own; `said` is all it wrote."""

    def __init__(self, *args: str, program: tuple[str, ...] = ("-m", "lightning_semgen"), **environment: str):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)} | environment
        self.log = Path(f"{time.monotonic_ns()}.log")
        with self.log.open("w") as log:
            command = [sys.executable, *program, *args]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.process.poll() is None, self.said
            time.sleep(0.05)


@pytest.fixture
def start():
    """Starts commands, of which nothing is left after the test."""
    started = []

    def command(*args: str, **options) -> Started:
        started.append(Started(*args, **options))
        return started[-1]

    yield command
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)


LONG = ("--checkpoint.every_n_train_steps=3", "--trainer.accelerator=cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, os.EX_TEMPFAIL), (signal.SIGTERM, 143)])
def test_a_slurm_job_that_is_told_to_end_saves_its_run(number, code, workspace, start):
    """As SLURM does, all processes of a task are told, those that load data too; a script stands in for scontrol."""
    (workspace / "scontrol").write_text('#!/bin/sh\necho "$@" >> scontrol.log\n')
    (workspace / "scontrol").chmod(0o755)
    slurm = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0",
        "SLURM_JOB_NAME": "dim8", "SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11",
        "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port()), "PATH": f"{workspace}:{os.environ['PATH']}",
    }  # fmt: skip
    args = fit("run", 2000, *LONG, "--trainer.devices=2", "--trainer.strategy=fsdp2", "--data.num_workers=1")
    tasks = [start(*args, **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in ("0", "1")]
    tasks[0].wait_for(Path("run/checkpoints/last.ckpt"))
    for task in tasks:
        os.killpg(task.process.pid, number)
    assert [task.process.wait() for task in tasks] == [code, code], tasks[0].said
    step = load_checkpoint("run")["global_step"]
    assert f"Stopped by {number.name} at step {step}: go on with --ckpt_path last" in tasks[0].said
    requeued = number == signal.SIGUSR1
    assert Path("scontrol.log").exists() == requeued
    assert not requeued or Path("scontrol.log").read_text() == "requeue 4700_11\n"
    on_two_ranks(*fit("run", step + 2, "--trainer.strategy=fsdp2"))
    assert load_checkpoint("run")["global_step"] == step + 2


@pytest.mark.slow
def test_sigterm_to_the_process_that_started_the_others(workspace, start):
    run = start(*fit("run", 2000, *LONG, "--trainer.devices=2", "--trainer.strategy=ddp"))
    run.wait_for(Path("run/checkpoints/last.ckpt"))
    run.process.terminate()
    assert run.process.wait() == 143
    assert f"Stopped by SIGTERM at step {load_checkpoint('run')['global_step']}" in run.said
