"""AdamW, and how the learning rates of generator and compressor rise and fall."""

import math
import re
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

CONFIGURED = ("initial_lr", "weight_decay", "betas", "eps")  # of a group: what the config says, and not the training


def factor(step: int, warmup: int, end: int) -> float:
    """Linear warm-up, then a cosine that is 0 at `end` and stays there."""
    if step >= end:
        return 0.0
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / end))


def adamw(
    generator: Iterable[tuple[str, nn.Parameter]],
    compressor: list[nn.Parameter],
    lr: float,
    weight_decay: float,
    warmup: int,
    steps: int,
    compressor_steps: int,
) -> dict:
    """Optimiser and schedule as Lightning takes them; the compressor's group is the last, if it learns at all.

    What decays is told by names, since FSDP has flat pieces in place of matrices. The compressor's end is a learning
    rate of 0 rather than a missing gradient: DDP and FSDP see one graph at every step.
    """
    decays, stays = [], []
    for name, parameter in generator:
        (stays if re.search(r"bias$|norm[^.]*\.weight$", name) else decays).append(parameter)
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": stays, "weight_decay": 0.0}]
    factors = [partial(factor, warmup=warmup, end=steps)] * 2
    if compressor:
        groups.append({"params": compressor, "weight_decay": 0.0})
        factors.append(partial(factor, warmup=warmup, end=compressor_steps))
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), fused=True)
    optimizer._step_supports_amp_scaling = False  # the scaler unscales: Lightning clips no gradients otherwise
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    optimizer.configured = [{name: group[name] for name in CONFIGURED} for group in optimizer.param_groups]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def follow_config(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Gives an optimiser of `adamw` the config's values again, after a checkpoint's state has brought those it had.

    The schedule too is the config's, at the step that the checkpoint says. An unchanged config changes no bit.
    """
    groups = optimizer.param_groups
    for group, configured in zip(groups, optimizer.configured, strict=True):
        group.update(configured)
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    for group, factor_at in zip(groups, schedule.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor_at(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in groups]
