"""The exponential moving average of a network's weights (EMA), kept as a second module beside it.

It is a module like any other, without gradients, so that every strategy moves, shards and saves it like the network.
"""

from copy import deepcopy

import torch
from torch import nn


def ema_copy(network: nn.Module) -> nn.Module:
    """The average at its start: a copy of the network, without gradients."""
    return deepcopy(network).requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Moves the average towards the network. In the first steps it moves faster, since their weights are random."""
    decay = min(decay, (1 + step) / (10 + step))
    averages = list(ema.parameters())
    latest = [p.to(a.dtype) for p, a in zip(network.parameters(), averages, strict=True)]
    torch._foreach_lerp_(averages, latest, 1 - decay)
