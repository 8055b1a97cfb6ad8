"""What needs GPUs: every strategy, in bfloat16, with compiled blocks, on one rank and on two.

On a machine with one GPU two ranks share it: NCCL takes them for two machines, and they talk through the network stack.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_semgen.runs import load_checkpoint, load_stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STRATEGIES = ["ddp", "fsdp", "fsdp2"]
SHARES = ["fsdp_dcp", "fsdp2_dcp"]  # of which each rank saves its share


def start(run: str, *args: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "lightning_semgen", "fit", "-c", f"{CONFIGS}/dim8.yaml", *SMALL,
        f"--trainer.default_root_dir={run}", "--trainer.accelerator=gpu", "--model.compressor_steps=4",
        "--trainer.gradient_clip_val=1.0", "--trainer.log_every_n_steps=1", *args,
    ]  # fmt: skip
    environment = (
        os.environ | {"PYTHONPATH": f"{CONFIGS.parent}:{os.environ.get('PYTHONPATH', '')}"} | (environment or {})
    )
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> None:
    said = [process.communicate(timeout=120)[0] for process in processes]
    for process, lines in zip(processes, said, strict=True):
        assert process.returncode == 0, lines[-3000:]


def fit(run: str, *args: str) -> None:
    finish(start(run, "--trainer.devices=1", *args))


def fit_on_two(run: str, *args: str) -> None:
    """With two clips on each rank; what torchrun would set for two nodes of one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": "0", "GROUP_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
            "CUDA_VISIBLE_DEVICES": str(rank % torch.cuda.device_count()), "NCCL_HOSTID": f"host{rank}",
            "NCCL_SOCKET_IFNAME": "lo", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1",
        }  # fmt: skip
        options = ("--trainer.devices=1", "--trainer.num_nodes=2", "--data.batch_size=2")
        processes.append(start(run, *options, *args, environment=environment))
    finish(*processes)


def curve(run: str) -> list[float]:
    return [event.value for event in EventAccumulator(run).Reload().Scalars("train/flow_loss")]


HALF = [(strategy, "bf16-mixed") for strategy in (*STRATEGIES, *SHARES)] + [
    ("fsdp", "bf16-true"),
    ("fsdp2", "bf16-true"),
]


@pytest.mark.parametrize(("strategy", "precision"), HALF)
def test_a_fit_in_bfloat16_is_resumed_and_read(strategy, precision, workspace):
    options = (f"--trainer.strategy={strategy}", f"--trainer.precision={precision}")
    fit("run", *options, "--trainer.max_steps=8")
    fit("run", *options, "--trainer.max_steps=12", "--ckpt_path=last")
    state = load_checkpoint("run")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    generator = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert state["generator.transformer.proj_out.weight"].dtype == generator
    assert state["ema.transformer.proj_out.weight"].dtype == torch.float32
    assert state["space.compressor.standardise.var"].dtype == torch.float32
    load_stage("run")


@pytest.mark.parametrize("strategy", [*STRATEGIES, *SHARES])
def test_two_ranks_learn_what_one_learns_and_it_goes_on_from_either(strategy, workspace):
    fit("one", "--trainer.max_steps=10")
    sharded = f"--trainer.strategy={strategy}"
    fit_on_two("two", sharded, "--trainer.max_steps=6")
    shutil.copytree("two", "mixed")
    fit_on_two("two", sharded, "--trainer.max_steps=10", "--ckpt_path=last")
    fit("mixed", "--trainer.max_steps=10", "--ckpt_path=last")
    if strategy in SHARES:
        assert len(list(Path("two/checkpoints/last.ckpt").glob("*.distcp"))) == 2
    expected = load_checkpoint("one")["state_dict"]
    for run in ("two", "mixed"):
        assert curve(run) == pytest.approx(curve("one"), rel=1e-3)
        found = load_checkpoint(run)["state_dict"]
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=5e-3, msg=f"{run} {name}")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_and_checkpointed_blocks(strategy, workspace):
    blocks = ("--model.compile_blocks=true", "--model.checkpoint_blocks=true", "--trainer.precision=bf16-mixed")
    fit("run", *blocks, f"--trainer.strategy={strategy}", "--trainer.max_steps=6")
    state = load_checkpoint("run")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not any("_orig_mod" in name for name in state)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_two_ranks_in_bfloat16_with_compiled_blocks(strategy, workspace):
    options = ("--model.compile_blocks=true", "--trainer.precision=bf16-mixed", "--trainer.max_steps=6")
    fit("one", *options)
    fit_on_two("two", *options, f"--trainer.strategy={strategy}")
    assert curve("two") == pytest.approx(curve("one"), rel=0.03)
