"""When and where a token is, and the rotary angles that follow from it.

A token's time is that of the last frame it has seen, in seconds; its place is the centre of its cell as a fraction
of the frame. Tokens of different grids that show the same thing so get the same angles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Tokens on a regular grid: `seconds` holds T times, each with height × width cells."""

    seconds: tuple[float, ...]
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.seconds) * self.height * self.width


def rotary_positions(grid: Grid, reference: Grid, rate: float) -> Tensor:
    """Positions (N, 3) in float64, order t, y, x: whole numbers on the reference grid, fractions on a coarser one.

    `rate` is the base model's latents per second.
    """
    t = torch.tensor(grid.seconds, dtype=torch.float64) * rate
    y, x = (
        (torch.arange(n, dtype=torch.float64) + 0.5) / n * tokens - 0.5
        for n, tokens in ((grid.height, reference.height), (grid.width, reference.width))
    )
    return torch.cartesian_prod(t, y, x)


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> Tensor:
    """Angles (N, head_dim / 2) in float64: Wan's split of a head's pairs over t, y and x."""
    space = 2 * (head_dim // 6)
    angles = []
    for axis, dim in enumerate((head_dim - 2 * space, space, space)):
        rates = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[:, axis, None] * rates)
    return torch.cat(angles, dim=1)


def upcast(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotates interleaved pairs of x (B, N, heads, head_dim) by complex factors exp(i·angle) (N, 1, head_dim / 2)."""
    pairs = upcast(x).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # Inductor fuses what is real and not what is complex; by itself that is faster
        (a, b), cos, sin = pairs.unbind(-1), turns.real, turns.imag
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).type_as(x)
