"""Windows against attention with a mask that is written down straight from their definition."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from test_transformer import TINY

from lightning_semgen.errors import UserError
from lightning_semgen.model import blocks, transformer
from lightning_semgen.model.condition import Condition, SemanticTokens
from lightning_semgen.model.positions import Grid
from lightning_semgen.model.transformer import VideoTransformer
from lightning_semgen.model.windows import windows_of

CPU = torch.device("cpu")


def grids(latent_steps: int, semantic_step: float | None) -> tuple[Grid, ...]:
    """Latents every 4/24 s, 2 × 1 cells; semantic steps of 1 × 2 cells that end within the clip."""
    seconds = tuple(k * 4 / 24 for k in range(latent_steps))
    if semantic_step is None:
        return (Grid(seconds, 2, 1),)
    count = int(seconds[-1] / semantic_step)
    return Grid(seconds, 2, 1), Grid(tuple(semantic_step * (n + 0.5) for n in range(count)), 1, 2)


def window_numbers(tokens: tuple[Grid, ...], seconds: float, shifted: bool) -> list[int]:
    """The window of every token, in exact arithmetic, token by token."""
    steps = [(Fraction(t).limit_denominator(10_000), grid) for grid in tokens for t in grid.seconds]
    exact = [t for t, grid in steps for _ in range(grid.height * grid.width)]
    t_w, end = Fraction(seconds), max(exact)
    if end <= t_w:
        return [0] * len(exact)
    shift = t_w / 2 if shifted else Fraction(0)
    last = 0  # the last window that may begin: what is left of the clip is T_w / 2 or more
    while end - (t_w * (last + 1) - shift) >= t_w / 2:
        last += 1
    numbers = []
    for t in exact:
        n = 0
        while not t_w * n - shift < t <= t_w * (n + 1) - shift and t > 0:
            n += 1
        numbers.append(min(n, last))
    return numbers


CASES = [
    pytest.param(seconds, steps, semantic_step, id=f"{seconds}s-{steps}-{semantic_step}")
    for seconds in (5.0, 2.5, 1.25)
    for steps, semantic_step in (
        (61, 1.25), (69, 0.625), (38, 1.875), (47, 1.25), (100, 0.3), (31, 0.0625 * 7), (73, None), (34, 1.0)
    )
]  # fmt: skip


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("seconds", "steps", "semantic_step"), CASES)
def test_every_token_is_in_the_one_window_of_its_time(seconds, steps, semantic_step, shifted):
    tokens = grids(steps, semantic_step)
    windows = windows_of(tokens, seconds, shifted, CPU)
    number = torch.tensor(window_numbers(tokens, seconds, shifted))
    if not windows.groups:
        assert number.unique().numel() == 1
        return
    everything = torch.arange(len(number))[None]
    assert torch.equal(windows.gather(everything).sort().values, everything)
    assert torch.equal(windows.restore(windows.gather(everything)), everything)
    lengths = [length for count, length in windows.groups for _ in range(count)]
    members = windows.gather(everything)[0].split(lengths)
    assert len({length for _, length in windows.groups}) == len(windows.groups)  # equal windows are one group
    assert {tuple(m.tolist()) for m in members} == {
        tuple((number == n).nonzero()[:, 0].tolist()) for n in number.unique()
    }


@pytest.fixture
def masked_attention(monkeypatch):
    """Has self-attention in full, with a mask for each layer, in place of windows."""

    def use(masks: list[torch.Tensor]) -> None:
        layers = iter(masks)

        def attention(q, k, v, groups=None):
            mask = None if groups is None else next(layers)
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)

        monkeypatch.setattr(blocks, "attention", attention)

    return use


def network(window_seconds: float | None) -> VideoTransformer:
    torch.manual_seed(0)
    model = VideoTransformer(4, 20, TINY, semantic_dim=8, window_seconds=window_seconds)
    torch.nn.init.normal_(model.proj_out.weight)
    return model


def inputs(tokens: tuple[Grid, ...]) -> tuple:
    torch.manual_seed(1)
    z, t, text = torch.randn(2, 4, len(tokens[0].seconds), 4, 2), torch.tensor([0.2, 0.8]), torch.randn(2, 5, 20)
    semantics = None
    if len(tokens) == 2:
        shape = (len(tokens[1].seconds), tokens[1].height, tokens[1].width)
        semantics = SemanticTokens(torch.randn(2, *shape, 8), torch.tensor([0.0, 0.2]), tokens[1])
    return z, t, Condition(text, semantics), tokens[0].seconds


@pytest.mark.parametrize(("seconds", "steps", "semantic_step"), CASES)
def test_windows_are_attention_with_a_mask(seconds, steps, semantic_step, masked_attention):
    tokens = grids(steps, semantic_step)
    arguments = inputs(tokens)
    windowed, masked = network(seconds), network(None)
    output = windowed(*arguments)
    output.square().mean().backward()
    numbers = [torch.tensor(window_numbers(tokens, seconds, shifted)) for shifted in (False, True)]
    masked_attention([n[:, None] == n for n in numbers])
    reference = masked(*arguments)
    reference.square().mean().backward()
    assert (output - reference).abs().max() / reference.std() <= 5e-5
    for (name, mine), theirs in zip(windowed.named_parameters(), masked.parameters(), strict=True):
        if theirs.grad is not None:  # the embedding of semantics has none where there are none
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_clip_no_longer_than_a_window_attends_in_full():
    arguments = inputs(grids(31, 1.25))  # 5 s to the last frame
    assert torch.equal(network(5.0)(*arguments), network(None)(*arguments))
    assert not torch.equal(network(4.9)(*arguments), network(None)(*arguments))


@pytest.mark.parametrize(("shifted", "counts"), [(False, [1, 11]), (True, [1, 11, 1])])
def test_a_minute_of_video_is_few_calls(shifted, counts):
    assert [count for count, _ in windows_of(grids(361, 1.25), 5.0, shifted, CPU).groups] == counts


def test_what_validation_lays_out_training_can_use():
    arguments = inputs(grids(40, 1.25))
    model = network(2.5)
    transformer.layouts.cache_clear()
    with torch.inference_mode():
        model(*arguments)
    model(*arguments).square().mean().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


@pytest.mark.parametrize("seconds", [0.0, -5.0, float("nan")])
def test_a_window_of_no_length_is_refused(seconds):
    from conftest import CLIP

    from lightning_semgen.stages.latent import LatentStage

    with pytest.raises(UserError, match=f"window_seconds is {seconds}"):
        LatentStage(clip=CLIP, window_seconds=seconds)
