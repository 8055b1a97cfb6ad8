"""What a run on many ranks meets on a cluster: signals, ranks that die, checkpoints in pieces, bfloat16."""

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
