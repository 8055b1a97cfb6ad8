"""The flow loss in bands of t."""

import torch
from torch import Tensor
from torchmetrics import Metric


class FlowLossBands(Metric):
    """Mean of per-sample values of all ranks, in total and in equal bands of t. Empty bands are left out."""

    def __init__(self, bands: int = 4):
        super().__init__()
        self.bands = bands
        self.add_state("total", torch.zeros(bands), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(bands), dist_reduce_fx="sum")

    def update(self, values: Tensor, t: Tensor) -> None:
        """values (B,), t (B,) in [0, 1]."""
        band = (t * self.bands).long().clamp(max=self.bands - 1)
        self.total.index_add_(0, band, values.detach().float())
        self.count.index_add_(0, band, torch.ones_like(t, dtype=self.count.dtype))

    def compute(self) -> dict[str, Tensor]:
        """ "", the mean of all, and "t 0.00-0.25", …"""
        edges = [f"t {band / self.bands:.2f}-{(band + 1) / self.bands:.2f}" for band in range(self.bands)]
        means = {e: t / c for e, t, c in zip(edges, self.total, self.count, strict=True) if c > 0}
        return {"": self.total.sum() / self.count.sum()} | means
