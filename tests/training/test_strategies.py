"""Two ranks learn what one process learns, under every strategy, and each reads the other's checkpoints."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, SMALL, on_two_ranks, see
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_semgen.cli import main
from lightning_semgen.runs import load_checkpoint

HALF, WHOLE = 8, 20
OPTIONS = (
    *SMALL, "--trainer.log_every_n_steps=1", "--trainer.gradient_clip_val=0.5", "--trainer.precision=64-true",
    "--model.compressor_steps=4", "--model.warmup_steps=5",
)  # fmt: skip


def fit(run: str, steps: int, batch_size: int, batches: int, *args: str, config: str = "dim8") -> list[str]:
    """To that many steps of 4 clips and `batches` batches, after which it validates on 4 clips; resumes what is there.

    Lightning counts batches on through a run, whatever they were.
    """
    options = [f"--trainer.default_root_dir={run}", f"--trainer.max_steps={steps}", f"--data.batch_size={batch_size}"]
    resume = ["--ckpt_path=last"] if Path(run).exists() else []
    return [
        "fit",
        "-c",
        f"{CONFIGS}/{config}.yaml",
        *OPTIONS,
        *options,
        f"--trainer.val_check_interval={batches}",
        *resume,
        *args,
    ]


def on_one(*args: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_semgen.stages.semantic_space.MEASURED_CLIPS", 16)
        patch.setattr(sys, "argv", ["lightning", *args])
        main()


@pytest.fixture(scope="module")
def fitted(shards, tmp_path_factory) -> Path:
    """A folder with a run of one process: after some of the steps, and at the end."""
    folder = see(shards, tmp_path_factory.mktemp("strategies"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        on_one(*fit("half", HALF, 4, HALF))
        shutil.copytree("half", "whole")
        on_one(*fit("whole", WHOLE, 4, WHOLE))
    return folder


@pytest.fixture
def runs(fitted, monkeypatch) -> None:
    monkeypatch.chdir(fitted)


def curves(run: str) -> dict[str, list[float]]:
    events = EventAccumulator(run).Reload()
    tags = [
        tag for tag in events.Tags()["scalars"] if tag.startswith(("train/flow_loss", "train/grad", "val", "z_sem"))
    ]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in tags}


def check_same(run: str, other: str) -> None:
    """The same to the rounding of sums in another order.

    Which is of float64: where a gradient is no more than rounding, AdamW makes whole steps of it.
    """
    first, second = (load_checkpoint(folder) for folder in (run, other))
    assert first["global_step"] == second["global_step"]
    assert first["VideoDataModule"] == second["VideoDataModule"]
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, tensor in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    assert moments[0].keys() == moments[1].keys()
    for name, state in moments[0].items():
        torch.testing.assert_close(moments[1][name]["exp_avg"], state["exp_avg"], rtol=1e-5, atol=1e-7, msg=name)
    one, two = curves(run), curves(other)
    assert one.keys() == two.keys() and len(one["train/flow_loss"]) == first["global_step"]
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_learn_what_one_process_learns(strategy, runs):
    two = f"--trainer.strategy={strategy}"
    accumulate = ("--trainer.accumulate_grad_batches=2", "--trainer.limit_val_batches=2")
    on_two_ranks(*fit(strategy, HALF, 1, 2 * HALF, two, *accumulate))
    check_same("half", strategy)
    on_one(*fit(strategy, WHOLE, 4, HALF + WHOLE))
    check_same("whole", strategy)
    shutil.copytree("half", f"half_{strategy}")
    on_two_ranks(*fit(f"half_{strategy}", WHOLE, 2, WHOLE, two))
    check_same("whole", f"half_{strategy}")


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(runs, fails):
    options = ("--model.lr=1e30", "--trainer.log_every_n_steps=50", "--checkpoint.every_n_train_steps=1")
    said = fails(*fit("diverged", WHOLE, 4, WHOLE, *options), small=False)
    assert "was not finite in the steps up to 2" in said and "model.lr" in said
    assert load_checkpoint("diverged")["global_step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_both_stages_of_a_sharded_run_make_videos(precision, runs):
    options = ("--trainer.strategy=fsdp2", f"--trainer.precision={precision}")
    semantic, latent = f"semantic_{precision}", f"latent_{precision}"
    on_two_ranks(*fit(semantic, 6, 2, 6, *options))
    on_one(*fit(f"one_{precision}", 6, 4, 6, f"--trainer.precision={precision}"))
    losses = [curves(run)["train/flow_loss"] for run in (semantic, f"one_{precision}")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    learnt = (f"--model.compressor={semantic}", "--data.encoded=null")
    on_two_ranks(*fit(latent, 3, 2, 3, *learnt, *options, config="latent_dim8"))
    state = load_checkpoint(latent)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    generator = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert state["generator.transformer.proj_out.weight"].dtype == generator
    assert state["ema.transformer.proj_out.weight"].dtype == torch.float32
    assert state["space.compressor.standardise.var"].dtype == torch.float32
    assert "gallery/videos" in EventAccumulator(latent).Reload().Tags()["images"]
    on_two_ranks("test", "-c", f"{latent}/config.yaml", *SMALL, *options, "--trainer.limit_test_batches=1")
    assert len(list(Path(latent, "test").glob("*.mp4"))) == 8  # a batch of 4 on each rank
    prompts = Path(f"prompts_{precision}.txt")
    prompts.write_text("a red circle moves up\na blue bar moves left\na green pillar moves down")
    one_each = (f"--data.prompts={prompts}", "--data.batch_size=1")  # two for one rank, one for the other
    on_two_ranks("predict", "-c", f"{latent}/config.yaml", *SMALL, *options, *one_each)
    assert len(list(Path(latent, "predict").glob("*.mp4"))) == 3


@pytest.mark.slow
def test_nodes_that_keep_a_copy_each(runs):
    on_two_ranks(*fit("copies", HALF, 2, HALF, "--trainer.strategy=fsdp2_hybrid"), nodes=2)
    check_same("half", "copies")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_signal_stops_all_ranks_and_the_run_goes_on(strategy, runs):
    run = f"signalled_{strategy}"
    shutil.copytree("half", run)
    options = (f"--trainer.strategy={strategy}", "--trainer.accelerator=cpu", "--trainer.devices=2")
    command = [sys.executable, "-m", "lightning_semgen", *fit(run, 200, 2, 200, *options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events = len(list(Path(run).glob("events*")))
    while len(list(Path(run).glob("events*"))) == events and process.poll() is None:
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == os.EX_TEMPFAIL
    step = load_checkpoint(run)["global_step"]
    assert HALF < step < 200
    on_one(*fit(run, step + 2, 4, step + 2))
    assert load_checkpoint(run)["global_step"] == step + 2
