"""The channels of semantics."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ChannelStatistics(Metric):
    """Mean, standard deviation and KL to N(0, 1) of each channel of semantics."""

    def __init__(self, channels: int):
        super().__init__()
        sums = torch.zeros(4, channels, dtype=torch.float64)  # n, Σz, Σz², ΣKL
        self.add_state("sums", sums, dist_reduce_fx="sum")

    def update(self, z: Tensor, kl: Tensor) -> None:
        """z, kl (…, d)."""
        z, kl = (values.detach().flatten(0, -2).double() for values in (z, kl))
        self.sums += torch.stack([torch.full_like(z[0], len(z)), z.sum(0), z.square().sum(0), kl.sum(0)])

    def compute(self) -> dict[str, Tensor]:
        """ "mean", "std" and "KL", each (d,)."""
        count, total, squares, kl = self.sums
        mean = total / count
        return {"mean": mean, "std": (squares / count - mean.square()).clamp(min=0).sqrt(), "KL": kl / count}
