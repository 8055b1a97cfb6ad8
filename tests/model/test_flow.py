"""Identities of rectified flow."""

import pytest
import torch

from data import random_numbers
from lightning_semgen.model import flow


@pytest.fixture
def draw():
    torch.manual_seed(0)
    return torch.randn(5, 3, 2, 4), torch.randn(5, 3, 2, 4), torch.rand(5)


def test_point_and_velocity_give_back_data_and_noise(draw):
    z_0, eps, t = draw
    z_t, v = flow.interpolate(z_0, eps, t), flow.velocity(z_0, eps)
    t = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(z_t - t * v, z_0)
    torch.testing.assert_close(z_t + (1 - t) * v, eps)


def test_ends_of_the_path(draw):
    z_0, eps, _ = draw
    assert torch.equal(flow.interpolate(z_0, eps, torch.zeros(5)), z_0)
    assert torch.equal(flow.interpolate(z_0, eps, torch.ones(5)), eps)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_exact_on_a_straight_path(draw, steps, shift):
    z_0, eps, _ = draw
    times = flow.sampling_times(steps, shift)
    torch.testing.assert_close(flow.euler(lambda z, t: flow.velocity(z_0, eps), eps, times), z_0)


def test_times_run_from_noise_to_data():
    times = flow.sampling_times(10, 3.0)
    assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()


def test_shift_moves_towards_noise_and_back():
    t = torch.linspace(0, 1, 11)
    assert torch.equal(flow.shift_time(t, 1.0), t)
    assert (flow.shift_time(t, 3.0)[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, 3.0), 1 / 3), t)


def test_dimension_shift_is_clamped():
    assert flow.dimension_shift(4 * 17 * 30 * 8) == pytest.approx(1.996, abs=1e-3)
    assert flow.dimension_shift(144) == 1.0
    assert flow.dimension_shift(10**9) == 8.0


def test_guidance_of_scale_one_is_none(draw):
    v, other, _ = draw
    assert torch.equal(flow.guide(v, (other, 1.0)), v)
    assert torch.equal(flow.guide(v), v)
    torch.testing.assert_close(flow.guide(v, (other, 0.0)), other)


def test_keyed_numbers_depend_on_key_and_purpose_alone():
    keys = torch.tensor([7, 8, 9])
    numbers = random_numbers.normal(keys, "noise", 4, 5)
    assert torch.equal(random_numbers.normal(keys[[2, 0]], "noise", 4, 5), numbers[[2, 0]])
    assert not torch.equal(random_numbers.normal(keys, "time", 4, 5), numbers)
    many = random_numbers.normal(torch.arange(2000), "noise", 3)
    assert many.mean().abs() < 0.05 and (many.std() - 1).abs() < 0.05
    assert abs(random_numbers.uniform(torch.arange(2000), "dropout").mean() - 0.5) < 0.03
