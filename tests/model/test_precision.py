"""Training in bfloat16: which tensors follow trainer.precision and which never do."""

import shutil

import pytest
import torch
from conftest import CONFIGS

from data import random_numbers
from lightning_semgen.runs import load_checkpoint

STEP = ("--trainer.max_steps=2", "--model.compressor_steps=1", "--trainer.gradient_clip_val=1.0")


@pytest.mark.parametrize("config", ["dim8", pytest.param("paper_recipe/paper_latent_dim8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("precision", "trained"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_only_the_generator_follows_the_trainers_precision(config, precision, trained, workspace, lightning):
    lightning("fit", "-c", f"{CONFIGS}/{config}.yaml", f"--trainer.precision={precision}", *STEP)
    checkpoint = load_checkpoint(f"runs/{config.split('/')[-1]}")
    dtypes = {}
    for name, tensor in checkpoint["state_dict"].items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
        if tensor.is_floating_point():
            dtypes.setdefault(name.split(".")[0], set()).add(tensor.dtype)
    others = {name: {torch.float32} for name in dtypes if name != "generator"}
    assert dtypes == others | {"generator": {trained}}
    moments = [s["exp_avg"].dtype for s in checkpoint["optimizer_states"][0]["state"].values()]
    parameters = len(list(name for name in checkpoint["state_dict"] if name.startswith("generator.")))
    assert set(moments[:parameters]) == {trained} and set(moments[parameters:]) == {torch.float32}
    averages, latest = (
        torch.cat([t.flatten().float() for n, t in checkpoint["state_dict"].items() if n.startswith(part)])
        for part in ("ema.", "generator.")
    )
    assert 0 < (averages - latest).abs().max() < 0.1


def test_noise_does_not_follow_the_default_precision():
    keys = torch.tensor([1, 2])
    normal, uniform = random_numbers.normal(keys, "noise", 3), random_numbers.uniform(keys, "time")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(random_numbers.normal(keys, "noise", 3), normal)
        assert torch.equal(random_numbers.uniform(keys, "time"), uniform)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_fit_with_compiled_and_checkpointed_blocks(workspace, lightning):
    options = ("--model.compile_blocks=true", "--model.checkpoint_blocks=true", "--trainer.precision=bf16-mixed")
    lightning("fit", "-c", f"{CONFIGS}/baseline_ct_swin.yaml", *options, *STEP)
    state = load_checkpoint("runs/baseline_ct_swin")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert not any("_orig_mod" in name for name in state)
