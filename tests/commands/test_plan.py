"""`lightning plan` against what a real step does, and what it says of configs whose weights are not here."""

import json

import pytest
import torch
from conftest import CLIP, CONFIGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lightning_semgen.cost import frozen_flops, step_cost
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage

BATCH = 4
CPU_ATTENTION = {  # torch's counter knows attention by the names of CUDA's kernels alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *s, **_: sdpa_flop_count(*s[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *s, **_: sdpa_backward_flop_count(*s[:4])
    ),
}


def drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


@pytest.fixture(scope="module", params=[SemanticStage, LatentStage])
def stage(request):
    torch.manual_seed(0)
    options = {"window_seconds": 0.5} if request.param is LatentStage else {}
    made = request.param(clip=CLIP, **options)
    made.generator.transformer.blocks = made.generator.transformer.blocks[:2]
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    return made


def real_step(stage) -> None:
    grid = stage.space.grid
    shape = (BATCH, len(grid.seconds), grid.height, grid.width, stage.space.encoder.dim)
    batch = {"key": torch.arange(BATCH), "features": torch.randn(shape), "caption": ["a red circle"] * BATCH}
    if isinstance(stage, LatentStage):
        batch["latents"] = torch.randn(BATCH, *stage.latent_shape)
    stage.total(stage.losses(batch, torch.rand(BATCH), stage.frozen.prompt(batch))).backward()


def allocated(stage) -> int:
    """The most bytes that the allocator has given a step at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        real_step(stage)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    return int(live.max())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_flops_and_memory_are_those_of_a_real_step(stage, checkpointed):
    cost = step_cost(stage, checkpointed)
    stage.generator.transformer.checkpoint_blocks = checkpointed
    real_step(stage)  # what is made once is not of a step
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter:
        real_step(stage)
    assert cost.flops * BATCH == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert cost.activations * BATCH == pytest.approx(allocated(stage), rel=0.15)


def test_flops_of_the_frozen_parts_are_those_of_real_ones(stage):
    frames = {"frames": torch.zeros(1, 49, 3, 48, 48, dtype=torch.uint8)}
    batch = frames | {"semantic_frames": frames["frames"][:, CLIP.semantic_indices]}
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter:
        stage.frozen.precompute(batch)
    assert frozen_flops(stage) == pytest.approx(counter.get_total_flops(), rel=0.02) and frozen_flops(stage) > 1e6


def plan(lightning, capsys, *args: str) -> dict:
    lightning("plan", "--json", *args, small=False)
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_deep_networks_are_measured_by_few_blocks(monkeypatch):
    stage = LatentStage(clip=CLIP, size="S", window_seconds=0.5)
    by_few = step_cost(stage)
    monkeypatch.setattr("lightning_semgen.cost.BLOCKS", (12,))
    whole = step_cost(stage)
    assert by_few.flops == whole.flops and by_few.activations == pytest.approx(whole.activations, rel=0.01)


@pytest.mark.slow
def test_the_papers_setting_is_planned_without_its_weights(lightning, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ("-c", f"{CONFIGS}/paper/latent_dim8.yaml", "--model.checkpoint_blocks=false")
    one, eight = (plan(lightning, capsys, *config, f"--gpus={gpus}", "--gpu=h100") for gpus in (1, 8))
    assert one["tokens"] == {"text": 512, "semantic": 4 * 17 * 30, "latent": 31 * 30 * 52}
    assert one["parameters"]["trained"] == pytest.approx(1.42e9, rel=0.01)
    for part in ("weights", "gradients", "optimiser state", "EMA"):
        assert one["memory"][part] == pytest.approx(8 * eight["memory"][part])
    assert one["memory"]["EMA"] == pytest.approx(4 * 1.42e9, rel=0.01)
    assert eight["flops"]["trained"] == 8 * one["flops"]["trained"]
    kept, checkpointed = one["largest_batch"].values()
    assert kept < checkpointed and one["fits"] == (kept >= 1)
    assert one["step_seconds"] == pytest.approx(one["flops"]["trained"] / (0.4 * 989e12))


def test_fsdp2_gathers_bfloat16_and_the_others_keep_a_copy_in_it(lightning, capsys):
    config = ("-c", f"{CONFIGS}/dim8.yaml", "--gpus=2", "--trainer.precision=bf16-mixed")
    parts = {s: plan(lightning, capsys, *config, f"--trainer.strategy={s}")["memory"] for s in ("ddp", "fsdp", "fsdp2")}
    copies = {strategy: "weights in bfloat16" in memory for strategy, memory in parts.items()}
    assert copies == {"ddp": True, "fsdp": True, "fsdp2": False}
    assert parts["fsdp"]["gathered blocks"] == 2 * parts["fsdp2"]["gathered blocks"]


def test_a_table_for_a_person(lightning, capsys):
    lightning("plan", "-c", f"{CONFIGS}/dim8.yaml", "--gpu", "l40s", "--trainer.strategy=ddp", "--gpus=2", small=False)
    said = capsys.readouterr().out
    assert "2 × l40s, ddp, 32-true" in said and "18 semantic" in said and "DDP's buckets" in said
    assert "It fits. There is no context parallelism: a clip of 2 s" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-c", f"{CONFIGS}/dim8.yaml", "--trainer.strategy=deepspeed"), "known are auto, ddp, fsdp and fsdp2"),
        (("-c", f"{CONFIGS}/dim8.yaml", "--gpu=b100"), "--gpu"),
        (("-c", f"{CONFIGS}/toy/vae.yaml"), "not for ToyVAETraining"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, fails):
    assert message in fails("plan", *arguments, small=False)


def test_a_fit_shows_its_share_of_a_known_peak(workspace, lightning, monkeypatch):
    monkeypatch.setattr("lightning_semgen.callbacks.throughput.peak_flops", lambda device: 1e12)
    lightning(
        "fit", "-c", f"{CONFIGS}/dim8.yaml", "--trainer.max_steps=2", "--model.compressor_steps=1",
        "--trainer.log_every_n_steps=1", "--data.encoded=null",
    )  # fmt: skip
    board = EventAccumulator(str(workspace / "runs/dim8")).Reload()
    clips, per_token, mfu, seconds = (
        board.Scalars(f"speed/{tag}")[-1].value
        for tag in ("clips_per_second", "tokens_per_second", "mfu", "step_seconds")
    )
    stage = SemanticStage(clip=CLIP)
    assert mfu == pytest.approx(clips * (step_cost(stage).flops + frozen_flops(stage)) / 1e12, rel=1e-3)
    assert per_token == pytest.approx(18 * clips, rel=1e-3) and seconds == pytest.approx(4 / clips, rel=1e-3)
