"""Metrics count what they say."""

import pytest
import torch

from data.toy.world import Composition, compositions, render
from lightning_semgen.evaluation.adherence import Adherence, wilson_lower
from lightning_semgen.evaluation.channel_statistics import ChannelStatistics
from lightning_semgen.evaluation.flow_loss_bands import FlowLossBands


def test_channel_statistics_are_those_of_all_batches():
    z, kl = torch.randn(6, 2, 3, 3, 5) * torch.arange(1, 6) + 7, torch.rand(6, 2, 3, 3, 5)
    statistics = ChannelStatistics(5)
    for rows in (slice(0, 4), slice(4, 6)):
        statistics.update(z[rows], kl[rows])
    found = statistics.compute()
    tokens = z.double().flatten(0, -2)
    torch.testing.assert_close(found["mean"], tokens.mean(0))
    torch.testing.assert_close(found["std"], tokens.std(0, correction=0))
    torch.testing.assert_close(found["KL"], kl.double().flatten(0, -2).mean(0))


def test_bands_of_t_hold_the_means_of_their_samples():
    bands = FlowLossBands()
    bands.update(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.2]))
    bands.update(torch.tensor([5.0]), torch.tensor([1.0]))
    assert bands.compute() == {"": 3.0, "t 0.00-0.25": 2.0, "t 0.75-1.00": 5.0}


def test_adherence_counts_right_attributes():
    import numpy as np

    shown = [render(c, np.random.default_rng(0)) for c in compositions("heldout")[:4]]
    videos = torch.from_numpy(np.stack(shown))
    infos = [vars(c) for c in compositions("heldout")[:4]]
    adherence = Adherence()
    adherence.update(videos, infos)
    assert all(adherence.compute()[name] == 1 for name in Adherence.attributes)
    wrong = Composition("red" if infos[0]["colour"] != "red" else "blue", "none", "none", "small")
    adherence.update(videos[:1], [vars(wrong)])
    adherence.update(videos[:1], [{"caption": "of which nothing else is known"}])
    assert adherence.compute()["colour"] == pytest.approx(4 / 5)


def test_wilson_bound_against_the_textbook():
    assert wilson_lower(0.9, 10) == pytest.approx(0.5958, abs=1e-4)
    assert wilson_lower(0.0, 10) == pytest.approx(0, abs=1e-9)
