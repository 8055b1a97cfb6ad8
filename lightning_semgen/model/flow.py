"""Rectified flow (SemanticGen §3.1): z_t = (1 − t) z_0 + t ε, the network predicts v = ε − z_0, t = 1 is noise.

Plain functions on tensors. z is (B, …), t is (B,) in [0, 1].
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_semgen.errors import UserError


def _like(t: Tensor, z: Tensor) -> Tensor:
    return t.view(-1, *[1] * (z.ndim - 1))


def interpolate(z_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t, the point at time t on the straight line from data to noise."""
    t = _like(t, z_0)
    return (1 - t) * z_0 + t * eps


def velocity(z_0: Tensor, eps: Tensor) -> Tensor:
    """The regression target dz_t/dt, the same at every t."""
    return eps - z_0


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Moves times towards noise: s·t / (1 + (s − 1)·t) for the factor s = `shift` (arXiv 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(n: Tensor, shift: float) -> Tensor:
    """Training times from standard normal numbers: sigmoid(n), shifted (Esser et al., arXiv 2403.03206)."""
    return shift_time(torch.sigmoid(n), shift)


def uniform(n: Tensor, shift: float) -> Tensor:
    """Training times from standard normal numbers: even on [0, 1], shifted."""
    return shift_time(torch.special.ndtr(n), shift)


def dimension_shift(numbers: int, low: float = 1.0, high: float = 8.0) -> float:
    """√(N·d / 4096), clamped: the shift for a sample of N tokens with d channels (RAE, arXiv 2510.11690)."""
    return min(max(math.sqrt(numbers / 4096), low), high)


def sampling_times(steps: int, shift: float) -> Tensor:
    """The `steps` + 1 times that a sampler visits, from 1 down to 0."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def guide(v: Tensor, *without: tuple[Tensor, float]) -> Tensor:
    """Classifier-free guidance: for each (velocity without a condition, scale), moves v away by scale − 1."""
    return v + sum((scale - 1) * (v - other) for other, scale in without)


@torch.no_grad()
def euler(predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, times: Tensor) -> Tensor:
    """Follows `predict(z_t, t)` from noise z at times[0] to times[-1]."""
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        z = z + (t_next - t) * predict(z, z.new_full((len(z),), t))
    return z


@torch.no_grad()
def heun(predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, times: Tensor) -> Tensor:
    """Euler with the mean of the velocities at both ends of each step; two predictions a step, one in the last."""
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        v = predict(z, z.new_full((len(z),), t))
        ahead = z + (t_next - t) * v
        if t_next > 0:
            v = (v + predict(ahead, z.new_full((len(z),), t_next))) / 2
        z = z + (t_next - t) * v
    return z


SAMPLERS = {"euler": euler, "heun": heun}
TIME_DISTRIBUTIONS = {"logit_normal": logit_normal, "uniform": uniform}  # each of (normal numbers, shift)


def look_up(option: str, table: dict[str, Callable], name: str) -> Callable:
    """A row of one of the tables; UserError lists the known names."""
    if name not in table:
        raise UserError(f"model.{option} {name!r} is not known; known are {', '.join(table)}.")
    return table[name]
