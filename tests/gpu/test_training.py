"""What needs GPUs: every strategy on all of them, in bfloat16, with compiled blocks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SMALL

from lightning_semgen.runs import load_checkpoint, load_stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STRATEGIES = ["ddp", "fsdp", "fsdp2"]
SHARES = ["fsdp_dcp", "fsdp2_dcp"]  # of which each rank saves its share


def fit(run: str, *args: str) -> None:
    command = [
        sys.executable, "-m", "lightning_semgen", "fit", "-c", f"{CONFIGS}/dim8.yaml", *SMALL,
        f"--trainer.default_root_dir={run}", "--trainer.accelerator=gpu", "--model.compressor_steps=4",
        "--trainer.gradient_clip_val=1.0", *args,
    ]  # fmt: skip
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(CONFIGS.parent)}, check=True)


@pytest.mark.parametrize("strategy", [*STRATEGIES, *SHARES])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
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


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_gpus_learn_what_one_learns(strategy, workspace):
    gpus = torch.cuda.device_count()
    fit("one", "--trainer.devices=1", "--trainer.max_steps=10", f"--data.batch_size={2 * gpus}")
    options = (f"--trainer.strategy={strategy}", f"--trainer.devices={gpus}")
    fit("all", *options, "--trainer.max_steps=10", "--data.batch_size=2")
    one, every = (load_checkpoint(run)["state_dict"] for run in ("one", "all"))
    for name, tensor in one.items():
        torch.testing.assert_close(every[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("strategy", SHARES)
def test_a_run_goes_on_from_shares_on_all_gpus_and_on_one(strategy, workspace):
    gpus = torch.cuda.device_count()
    every = (f"--trainer.devices={gpus}", f"--trainer.strategy={strategy}", "--data.batch_size=2")
    fit("unbroken", *every, "--trainer.max_steps=10")
    fit("all", *every, "--trainer.max_steps=6")
    assert len(list(Path("all/checkpoints/last.ckpt").glob("*.distcp"))) == gpus
    shutil.copytree("all", "one")
    fit("all", *every, "--trainer.max_steps=10", "--ckpt_path=last")
    one = ("--trainer.devices=1", f"--data.batch_size={2 * gpus}")
    fit("one", *one, "--trainer.max_steps=10", "--ckpt_path=last")
    unbroken = load_checkpoint("unbroken")
    for run in ("all", "one"):
        found = load_checkpoint(run)
        moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (found, unbroken)]
        for one, two in ((found["state_dict"], unbroken["state_dict"]), moments):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_and_checkpointed_blocks(strategy, workspace):
    blocks = ("--model.compile_blocks=true", "--model.checkpoint_blocks=true", "--trainer.precision=bf16-mixed")
    fit("run", *blocks, f"--trainer.strategy={strategy}", "--trainer.max_steps=6")
    state = load_checkpoint("run")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not any("_orig_mod" in name for name in state)
