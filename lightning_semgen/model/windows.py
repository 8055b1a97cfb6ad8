"""Attention within windows of time, so that its cost grows with a video's length and not with its square.

Window n holds all tokens, of every kind, with t in (n·T_w, (n + 1)·T_w], t = 0 in the first. Odd layers shift the
windows by T_w / 2. The ends are cut, never wrapped, and a remainder shorter than T_w / 2 joins its neighbour.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_semgen.model.positions import Grid

ROUNDING = 1e-6  # seconds, far less than a frame lasts: k·4/24 may lie on n·T_w only up to the rounding of both


@dataclass(frozen=True)
class Windows:
    """Which of N tokens attend to each other.

    Attributes:
        order: (N,) the tokens window by window, windows of equal size side by side; None: they stand so already.
        inverse: (N,) the way back.
        groups: in that order, (number of windows, tokens in each); empty: all tokens attend to all.
    """

    order: Tensor | None = None
    inverse: Tensor | None = None
    groups: tuple[tuple[int, int], ...] = ()

    def gather(self, x: Tensor) -> Tensor:
        """Tokens (B, N, …) in `order`."""
        return x if self.order is None else x.index_select(1, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """Undoes `gather`."""
        return x if self.inverse is None else x.index_select(1, self.inverse)


def windows_of(grids: tuple[Grid, ...], seconds: float | None, shifted: bool, device: torch.device) -> Windows:
    """The windows of `seconds` over the tokens of all grids; those of an odd layer are `shifted`."""
    times = torch.tensor([t for grid in grids for t in grid.seconds], dtype=torch.float64)
    end = times.max().item()
    if seconds is None or end <= seconds + ROUNDING:
        return Windows()
    first = seconds / 2 if shifted else seconds
    # A later cut would leave less than half a window, so there is none: the remainder joins the window before it.
    last = max(first, end - seconds / 2 + ROUNDING)
    cuts = torch.arange(first, last, seconds, dtype=torch.float64)
    steps = torch.bucketize(times - ROUNDING, cuts)  # the window of each step; what lies on a cut is before it
    window = steps.repeat_interleave(torch.tensor([g.height * g.width for g in grids for _ in g.seconds]))
    return _grouped(window, device)


def _grouped(window: Tensor, device: torch.device) -> Windows:
    # Attention needs no mask where windows of equal length lie side by side, as one batch. So windows are ordered by
    # length: at 24 fps the first one has one latent more than the others, and the last may be longer.
    lengths = window.bincount()  # 0 for a window that lies between two steps
    sizes = list(dict.fromkeys(lengths[lengths > 0].tolist()))  # in order of appearance
    counts = [int((lengths == size).sum()) for size in sizes]
    if sum(counts) == 1:
        return Windows()
    groups = tuple(zip(counts, sizes, strict=True))
    rank = torch.zeros_like(lengths)
    for index, size in enumerate(sizes):
        rank[lengths == size] = index
    order = (rank * len(lengths) + torch.arange(len(lengths)))[window].argsort(stable=True)
    if torch.equal(order, torch.arange(len(order))):
        return Windows(groups=groups)
    return Windows(order.to(device), order.argsort().to(device), groups)


def attention(q: Tensor, k: Tensor, v: Tensor, groups: tuple[tuple[int, int], ...] = ()) -> Tensor:
    """Attention of (B, N, heads, head_dim) within the windows of `groups`: a call for equal ones, without a mask."""
    if not groups:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    lengths = [count * length for count, length in groups]
    outputs = []
    for (count, length), *parts in zip(groups, *(x.split(lengths, dim=1) for x in (q, k, v)), strict=True):
        parts = (x.unflatten(1, (count, length)).flatten(0, 1) for x in parts)  # (B · count, length, heads, head_dim)
        outputs.append(attention(*parts).unflatten(0, (-1, count)).flatten(1, 2))
    return torch.cat(outputs, dim=1)
