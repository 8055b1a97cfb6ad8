"""What a run on many ranks meets on a cluster: signals, ranks that die, checkpoints in pieces."""

import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SMALL, on_two_ranks

from lightning_semgen.cli import main
from lightning_semgen.runs import load_checkpoint, load_stage
from lightning_semgen.training.checkpoints import put_in_place, unfinished_path


def fit(run: str, steps: int, *args: str, config: str = "dim8") -> list[str]:
    """To that many steps, of which the first 4 learn the compressor; resumes what is there."""
    resume = ["--ckpt_path=last"] if Path(run).exists() else []
    return [
        "fit", "-c", f"{CONFIGS}/{config}.yaml", *SMALL, "--data.batch_size=2", "--trainer.log_every_n_steps=1",
        "--model.compressor_steps=4", "--model.warmup_steps=5", f"--trainer.default_root_dir={run}",
        f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", *resume, *args,
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Started:
    """The command in a forked process with a group of its own; `said` is all it wrote."""

    def __init__(self, *args: str, **environment: str):
        self.log = Path(f"{time.monotonic_ns()}.log").absolute()
        self.process = get_context("fork").Process(target=self._run, args=(args, environment))
        self.process.start()

    def _run(self, args: tuple[str, ...], environment: dict[str, str]) -> None:
        os.setsid()
        sys.stdout = sys.stderr = self.log.open("w", buffering=1)
        for descriptor in (1, 2):
            os.dup2(sys.stderr.fileno(), descriptor)
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).handlers = [logging.StreamHandler()]
        os.environ |= environment
        sys.argv = ["lightning", *args]
        main()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def code(self, timeout: float | None = None) -> int | None:
        """With which it ended; None if it has not within that many seconds."""
        self.process.join(timeout)
        return self.process.exitcode

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert self.process.is_alive(), self.said
            time.sleep(0.05)


@pytest.fixture
def start():
    """Starts commands, of which nothing is left after the test."""
    started = []

    def command(*args: str, **environment: str) -> Started:
        started.append(Started(*args, **environment))
        return started[-1]

    yield command
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)


def two_ranks(start, *args: str) -> list[Started]:
    """Two ranks that are started one by one, as on two machines, by no launcher."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(*args, **world, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]


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
    assert [task.code() for task in tasks] == [code, code], tasks[0].said
    step = load_checkpoint("run")["global_step"]
    assert f"Stopped by {number.name} at step {step}: go on with --ckpt_path last" in tasks[0].said
    requeued = number == signal.SIGUSR1
    assert Path("scontrol.log").exists() == requeued
    assert not requeued or Path("scontrol.log").read_text() == "requeue 4700_11\n"
    on_two_ranks(*fit("run", step + 2, "--trainer.strategy=fsdp2"))
    assert load_checkpoint("run")["global_step"] == step + 2


def write(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir(parents=True)
        (path / "meta.pt").write_text(path.name)
    elif kind == "file":
        path.write_text(path.name)


@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_a_checkpoint_takes_the_place_of_any_other(before, after, tmp_path):
    path = tmp_path / "last.ckpt"
    write(path, before)
    write(unfinished_path(path), after)
    put_in_place(path)
    assert list(tmp_path.iterdir()) == [path]
    assert (path if after == "file" else path / "meta.pt").read_text() == "last.ckpt.partial"


def on_one(*args: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning", *args])
        main()


def check_close(run: str, other: str, tolerance: float = 0.0) -> None:
    """Weights, EMA, statistics, moments and rates of two runs, 0 for bit by bit."""
    first, second = load_checkpoint(run), load_checkpoint(other)
    assert first["global_step"] == second["global_step"]
    assert first["VideoDataModule"] == second["VideoDataModule"]
    assert first["lr_schedulers"] == second["lr_schedulers"]
    ((one,), (two,)) = (checkpoint["optimizer_states"] for checkpoint in (first, second))
    groups = [[(group["params"], group["lr"]) for group in optimizer["param_groups"]] for optimizer in (one, two)]
    assert groups[0] == groups[1]
    for state, other_state in ((first["state_dict"], second["state_dict"]), (one["state"], two["state"])):
        torch.testing.assert_close(other_state, state, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_each_rank_saves_its_share(workspace, start):
    file, folder = "--trainer.strategy=fsdp2", "--trainer.strategy=fsdp2_dcp"
    on_two_ranks(*fit("file", 6, file))
    on_two_ranks(*fit("folder", 6, folder))
    check_close("file", "folder")
    assert sorted(path.name for path in Path("folder/checkpoints").iterdir()) == ["last.ckpt"]
    assert len(list(Path("folder/checkpoints/last.ckpt").glob("*.distcp"))) == 2
    load_stage("folder")

    for run in ("on_two", "on_one", "as_file"):
        shutil.copytree("folder", run)
    on_two_ranks(*fit("file", 9, file))
    on_two_ranks(*fit("on_two", 9, folder))
    check_close("file", "on_two")
    on_two_ranks(*fit("as_file", 9, file))
    check_close("file", "as_file")
    on_one(*fit("on_one", 9, "--data.batch_size=4", "--trainer.accelerator=cpu"))
    check_close("file", "on_one", 1e-4)
    for run in ("as_file", "on_one"):
        assert Path(run, "checkpoints/last.ckpt").is_file()
    alone = (folder, "--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.devices=1")
    assert start(*fit("folder", 9, *alone)).code() == 0
    check_close("file", "folder", 1e-4)

    on_one(*fit("latent", 2, "--model.compressor=on_two", "--data.encoded=null", config="latent_dim8"))
    on_one("export", "on_two", "exported")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(victim, workspace, start):
    args = fit("run", 2000, *LONG, "--trainer.devices=2", "--trainer.strategy=fsdp2", "--data.num_workers=1")
    ranks = two_ranks(start, *args)
    ranks[0].wait_for(Path("run/checkpoints/last.ckpt"))
    os.kill(ranks[victim].process.pid, signal.SIGKILL)
    check_lost(ranks[1 - victim], 1 - victim)


@pytest.mark.slow
def test_a_rank_that_no_longer_answers_ends_the_others(workspace, start):
    """Stopped rather than killed, its connections stay open, as those of a machine that has gone."""
    strategy = ("--trainer.strategy=DDPStrategy", "--trainer.strategy.timeout=0:00:20")
    ranks = two_ranks(start, *fit("run", 2000, *LONG, "--trainer.devices=2", *strategy))
    ranks[0].wait_for(Path("run/checkpoints/last.ckpt"))
    os.kill(ranks[0].process.pid, signal.SIGSTOP)
    check_lost(ranks[1], 1)


def check_lost(rank: Started, number: int) -> None:
    """It ends by itself, with one sentence."""
    assert rank.code(60) == 1, rank.said
    assert f"Rank {number} of 2, on {socket.gethostname()}, has lost another one" in rank.said
    assert rank.said.strip().endswith("Go on from the last checkpoint with --ckpt_path last.")
    assert "Traceback" not in rank.said


LIGHTNING = ("-m", "lightning_semgen")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *LIGHTNING)


@contextlib.contextmanager
def launched(program: tuple[str, ...], args: list[str]) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Two ranks that a launcher has started and that have saved once, and where they write to."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
    command, log = [sys.executable, *program, *args, *LONG, "--trainer.devices=2"], Path("launched.log")
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        while not Path("run/checkpoints/last.ckpt").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield process, log
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("program", [LIGHTNING, TORCHRUN])
def test_launchers_end_what_is_left(program, workspace):
    """Lightning's, which itself is rank 0, and torchrun end the others; they or the rank itself name one."""
    with launched(program, fit("run", 2000, "--trainer.strategy=ddp")) as (process, log):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    assert re.search(r"has lost another one|\[rank: 1\] Child process|rank +: 1 ", log.read_text())


@pytest.mark.slow
def test_sigterm_to_the_process_that_started_the_others(workspace):
    with launched(LIGHTNING, fit("run", 2000, "--trainer.strategy=ddp")) as (process, log):
        process.terminate()
        assert process.wait() == 143
    assert f"Stopped by SIGTERM at step {load_checkpoint('run')['global_step']}" in log.read_text()
