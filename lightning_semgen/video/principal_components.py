"""Features as colours: their first three principal components."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def pca_colours(features: Tensor) -> Tensor:
    """Features or semantics (…, T', H', W', D) to uint8 RGB (…, T', 3, H', W'), by one projection for all of them.

    Each component spans its own 1st to 99th percentile and points so that most features are on its dark side: the
    same features always have the same colours.
    """
    with torch.autocast(features.device.type, enabled=False):  # directions need float32, whatever the trainer's
        return _colours(features.flatten(0, -2).float()).view(*features.shape[:-1], 3).movedim(-1, -3)


def _colours(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    components = x @ principal_directions(x)  # (N, ≤ 3)
    components = components * components.pow(3).sum(0).sign()
    components = F.pad(components, (0, 3 - components.shape[1]))  # one or two channels have no third component
    low, high = components.quantile(x.new_tensor([0.01, 0.99]), dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    return colours.round().byte()


def principal_directions(x: Tensor, steps: int = 30) -> Tensor:
    """(D, ≤ 3) leading principal directions of centred rows (N, D), by subspace iteration from a fixed start."""
    shape, generator = (x.shape[1], min(8, *x.shape)), torch.Generator().manual_seed(0)
    basis = torch.randn(shape, generator=generator, dtype=torch.float32).to(x)
    for _ in range(steps):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    return basis @ torch.linalg.svd(x @ basis, full_matrices=False).Vh[:3].T
