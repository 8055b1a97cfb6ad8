"""What semantic tokens may and may not change; the network against diffusers' Wan is in test_pretrained.py."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_semgen.errors import UserError
from lightning_semgen.model.condition import Condition, SemanticTokens
from lightning_semgen.model.positions import Grid, rotary_positions
from lightning_semgen.model.sizes import SIZES, Size, size_of
from lightning_semgen.model.transformer import VideoTransformer

TINY = Size(dim=48, depth=2, heads=2, ffn_dim=96)


def network(semantic_dim: int | None = 8, absolute_time: bool = False) -> VideoTransformer:
    torch.manual_seed(0)
    model = VideoTransformer(4, 20, TINY, semantic_dim=semantic_dim, absolute_time=absolute_time)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.proj_out.weight)
    return model


def inputs(seed: int = 1):
    torch.manual_seed(seed)
    seconds = tuple(4 * k / 24 for k in range(3))
    semantics = SemanticTokens(torch.randn(2, 1, 3, 3, 8), torch.tensor([0.0, 0.2]), Grid((0.3125,), 3, 3))
    z, t, text = torch.randn(2, 4, 3, 6, 6), torch.tensor([0.2, 0.8]), torch.randn(2, 5, 20)
    return z, t, Condition(text, semantics), seconds


def test_a_network_that_can_take_semantics_equals_one_that_never_heard_of_them():
    z, t, condition, seconds = inputs()
    arguments = z, t, Condition(condition.text), seconds
    assert torch.equal(network(8)(*arguments), network(None)(*arguments))


def test_semantics_and_their_noise_level_change_the_prediction():
    z, t, condition, seconds = inputs()
    model, semantics = network(), condition.semantics
    noisier = replace(semantics, tau=semantics.tau + 0.5)
    plain, told, louder = (
        model(z, t, Condition(condition.text, tokens), seconds) for tokens in (None, semantics, noisier)
    )
    assert (plain - told).abs().max() > 1e-3
    assert (louder - told).abs().max() > 1e-5


def test_the_first_prediction_is_zero():
    assert VideoTransformer(4, 20, TINY, semantic_dim=8)(*inputs()).abs().max() == 0


def test_steps_that_look_the_same_are_told_apart_by_absolute_time_alone():
    z, t, condition, seconds = inputs()
    alike, rest = torch.ones_like(z), (t, Condition(condition.text), seconds)
    relative, absolute = network(), network(absolute_time=True)
    torch.testing.assert_close(absolute(z, *rest), relative(z, *rest), rtol=0, atol=0)
    torch.nn.init.normal_(absolute.time_embedding.weight)
    for model, differs in ((relative, False), (absolute, True)):
        v = model(alike, *rest)
        assert ((v[:, :, 0] - v[:, :, 2]).abs().max() > 1e-2) == differs


def test_semantic_tokens_lie_between_the_latent_tokens_that_show_the_same():
    latents = Grid(tuple(4 * k / 24 for k in range(13)), 6, 6)
    positions = rotary_positions(latents, latents, rate=6.0)
    assert torch.equal(positions, positions.round())
    semantic = rotary_positions(Grid((0.625,), 3, 3), latents, rate=6.0)
    assert semantic[0].tolist() == [3.75, 0.5, 0.5]  # its cell covers latent cells 0 and 1


@pytest.mark.parametrize("name", SIZES)
def test_every_named_size_builds(name):
    with torch.device("meta"):
        VideoTransformer(16, 4096, size_of(name), semantic_dim=8)


def test_an_unknown_size_is_named():
    with pytest.raises(UserError, match="XXL.*toy"):
        size_of("XXL")


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_clip_is_in_a_batch_what_it_is_alone(dtype, close):
    z, t, condition, seconds = inputs()
    model, text, semantics = network().to(dtype), condition.text, condition.semantics
    together = model(z, t, condition, seconds)
    for row in (slice(0, 1), slice(1, 2)):
        own = SemanticTokens(semantics.z[row], semantics.tau[row], semantics.grid)
        alone = model(z[row], t[row], Condition(text[row], own), seconds)
        assert alone.dtype == dtype and (alone - together[row]).abs().max() / together.std() < close


def gradients(model: VideoTransformer) -> list[torch.Tensor]:
    model(*inputs()).square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("keep_attention", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(keep_attention):
    plain, checkpointed = network(), network()
    checkpointed.checkpoint_blocks, checkpointed.keep_attention = True, keep_attention
    assert all(map(torch.equal, gradients(plain), gradients(checkpointed)))


@pytest.mark.parametrize(("seconds", "graphs"), [(None, 1), (0.25, 2)])
def test_compiled_blocks_are_one_graph_for_each_layout(seconds, graphs):
    plain, compiled = network(), network()
    compiled.window_seconds = plain.window_seconds = seconds
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled.compile(backend=counter, fullgraph=True, dynamic=False)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for mine, theirs in zip(gradients(compiled), gradients(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients(compiled)
    assert counter.frame_count == graphs
