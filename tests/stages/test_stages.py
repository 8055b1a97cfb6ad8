"""Contracts of the two stages: what is trained, what is saved, what a sample depends on."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CLIP, stage

from data.batch import collate
from data.datasets import ClipDataset, Stream
from data.random_numbers import sample_key
from data.shards.reader import Shards
from lightning_semgen.errors import UserError
from lightning_semgen.stages.latent import LatentStage
from lightning_semgen.stages.semantic import SemanticStage
from lightning_semgen.training.optimizer import factor
from lightning_semgen.video.generated import previews

CAPTIONS = ["a small red circle moves left", "a big blue pillar goes up"]


@pytest.fixture(scope="module")
def batch(shards):
    stream = Stream(ClipDataset(Shards(str(shards / "shards/toy/train-*.tar")), CLIP), seed=0, open_shards=1)
    return collate([stream[position] for position in range(4)])


@pytest.fixture(scope="module")
def semantic():
    return stage(SemanticStage)


@pytest.fixture(scope="module")
def latent():
    return stage(LatentStage)


@pytest.mark.parametrize("cls", [SemanticStage, LatentStage])
@pytest.mark.parametrize("encoder", ["toy", "vae"])
def test_frozen_parts_are_nowhere_in_the_module_tree(cls, encoder):
    made = stage(cls, encoder=encoder)
    frozen = {id(p) for part in made.frozen.modules for p in part.parameters()}
    assert len(made.frozen.modules) == (2 if cls is LatentStage else 1) and frozen
    assert not frozen & {id(p) for p in made.parameters()}
    assert {name.split(".")[0] for name in made.state_dict()} <= {"space", "generator", "ema", "feature_decoder"}
    assert all(name.startswith("space.compressor.") for name in made.state_dict() if name.startswith("space."))


def test_the_ema_twin_is_a_copy_without_gradients(semantic):
    twins = list(zip(semantic.generator.parameters(), semantic.ema.parameters(), strict=True))
    assert all(a is not b and not b.requires_grad for a, b in twins)


def test_the_generator_sees_semantics_through_a_stop_gradient(semantic, batch):
    semantic.zero_grad()
    z_sem = semantic.space(batch)
    assert z_sem.requires_grad and z_sem.shape == (4, 2, 3, 3, 8)
    weight = semantic.space.compressor.mlp[0].weight
    semantic.training_step(batch, 0)["loss"].backward()
    learnt, weight.grad = weight.grad, None
    losses = semantic.losses(batch, torch.rand(4), semantic.frozen.prompt(batch))
    del losses["flow_loss"]
    semantic.total(losses).backward()
    torch.testing.assert_close(learnt, weight.grad)  # nothing came from the flow loss
    assert learnt.abs().max() > 0
    semantic.zero_grad()


def test_in_the_papers_order_the_flow_loss_teaches_the_compressor(latent, batch):
    latent.zero_grad()
    latent.training_step(batch, 0)["loss"].backward()
    assert latent.space.compressor.mlp[0].weight.grad.abs().max() > 0
    latent.zero_grad()


def test_everything_random_belongs_to_the_sample(latent, batch):
    order = [2, 0, 3, 1]
    shuffled = {
        name: values[order] if isinstance(values, torch.Tensor) else [values[i] for i in order]
        for name, values in batch.items()
    }
    torch.testing.assert_close(latent.training_step(batch, 0)["loss"], latent.training_step(shuffled, 0)["loss"])
    half = {name: values[:2] for name, values in batch.items()}
    torch.testing.assert_close(latent.space(half), latent.space(batch)[:2])


def test_the_same_prompt_and_seed_give_the_same_video(semantic, latent):
    keys = torch.tensor([sample_key("sample", 1), sample_key("sample", 2)])
    videos = previews(latent.render(CAPTIONS, keys, semantic.sample_semantics(CAPTIONS, keys)))
    assert videos.shape == (2, 49, 3, 48, 48) and videos.dtype == torch.uint8
    again = previews(latent.render(CAPTIONS, keys, semantic.sample_semantics(CAPTIONS, keys)))
    assert torch.equal(videos, again)
    other = previews(latent.render(CAPTIONS, keys + 1, semantic.sample_semantics(CAPTIONS, keys + 1)))
    assert not torch.equal(videos, other)


def test_guidance_of_scale_one_equals_no_guidance(semantic):
    keys = torch.tensor([5, 6])
    shape, told, empty = (8, 2, 3, 3), semantic.condition(CAPTIONS), semantic.condition(["", ""])
    plain = semantic.sample(shape, keys, told, [])
    assert torch.equal(semantic.sample(shape, keys, told, [(empty, 1.0)]), plain)
    assert not torch.allclose(semantic.sample(shape, keys, told, [(empty, 3.0)]), plain)


def test_dropped_semantics_are_pure_noise_and_are_told_so(batch):
    made = stage(LatentStage, semantic_dropout=1.0, semantic_guidance_scale=2.0)
    tau = made.training_noise(batch["key"])
    assert torch.equal(tau, torch.ones(4))
    one, other = (made.noised(z, batch["key"], tau, made.space.grid).z for z in torch.randn(2, 4, 2, 3, 3, 8))
    assert torch.equal(one, other)
    with pytest.raises(UserError, match="semantic_dropout"):
        stage(LatentStage, semantic_guidance_scale=2.0)


def test_training_noise_is_even_up_to_its_level(latent):
    tau = latent.training_noise(torch.arange(2000))
    assert tau.min() >= 0 and tau.max() <= 0.3 and abs(tau.mean() - 0.15) < 0.01


def test_token_times_of_both_streams_agree(latent):
    assert latent.space.grid.seconds == (0.625, 1.875)
    assert latent.seconds == pytest.approx([4 * k / 24 for k in range(13)])
    assert all(second in latent.clip.times for second in latent.space.grid.seconds + latent.seconds)


def test_the_one_stage_baseline_needs_no_semantics(batch):
    made = stage(LatentStage, encoder="none")
    assert made.space is None and made.can_make_videos()
    made.training_step(batch, 0)["loss"].backward()
    assert previews(made.videos(CAPTIONS, torch.tensor([1, 2]))).shape == (2, 49, 3, 48, 48)
    with pytest.raises(UserError, match="cannot be none"):
        stage(SemanticStage, encoder="none")


def test_without_compression_features_are_generated():
    made = stage(SemanticStage, semantic_dim=None)
    assert made.space.channels == made.space.encoder.dim and made.compressor_steps == 0
    assert not hasattr(made, "feature_decoder")


def test_measured_statistics_standardise(semantic, batch):
    semantic.space.measure([batch], clips=4, batch_size=4)
    z_sem = semantic.space(batch).flatten(0, -2)
    torch.testing.assert_close(z_sem.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(z_sem.std(0, correction=0), torch.ones(8), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("clips", "passes"), [(3, 1), (9, 3), (10**6, 4)])  # 16 are measured at most in tests
def test_no_clip_of_a_small_set_is_measured_twice(semantic, batch, clips, passes):
    stream = iter([batch] * 10)
    semantic.space.measure(stream, clips, batch_size=4)
    assert len(list(stream)) == 10 - passes


def test_learning_rate_warms_up_and_ends_at_zero():
    factors = [factor(step, warmup=10, end=100) for step in range(120)]
    assert factors[0] == pytest.approx(0.1) and max(factors) > 0.9
    assert factors[99] < 1e-3 and set(factors[100:]) == {0.0}


def test_a_checkpoint_trained_with_other_frozen_weights_is_refused(latent):
    checkpoint = {}
    latent.on_save_checkpoint(checkpoint)
    latent.on_load_checkpoint(checkpoint)
    checkpoint["fingerprint"]["vae_weights"] = "others"
    with pytest.raises(UserError, match="vae_weights others"):
        latent.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(("step", "counted"), [(9, True), (10, False)])
def test_clipping_does_not_count_a_frozen_compressor(step, counted, batch):
    made = stage(SemanticStage, compressor_steps=10)
    made.training_step(batch, 0)["loss"].backward()
    made.compressor_learning.on_before_optimizer_step(SimpleNamespace(global_step=step), made, None)
    assert all((p.grad is not None) == counted for p in made.compressor_parameters())
    assert any(p.grad is not None for p in made.generator.parameters())
