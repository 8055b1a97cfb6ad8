"""What is measured over many batches: flow loss in bands of t, the channels of semantics, adherence to prompts."""

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor
from torchmetrics import Metric

from data.checker import read_video


class TimeBands(Metric):
    """Mean of per-sample values, of all ranks, and in equal bands of t; `compute` leaves out bands without samples."""

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


class Adherence(Metric):
    """Share of toy videos in which the checker reads the colour, shape and direction of the prompt."""

    attributes = ("colour", "shape", "direction")

    def __init__(self):
        super().__init__()
        self.add_state("right", torch.zeros(len(self.attributes)), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, videos: Tensor, infos: Sequence[dict]) -> None:
        """videos uint8 (B, T, 3, H, W); infos name the attributes that each should show, or it is not counted."""
        for video, info in zip(videos, infos, strict=True):
            if not info.keys() >= set(self.attributes):
                continue
            reading = read_video(video.cpu())
            right = [getattr(reading, name) == info[name] for name in self.attributes]
            self.right += torch.tensor(right, device=self.right.device)
            self.count += 1

    def compute(self) -> dict[str, float]:
        """For each attribute the share, and the lower end of its 95 % Wilson interval; nothing without videos."""
        if (n := self.count.item()) == 0:
            return {}
        shares = {name: right.item() / n for name, right in zip(self.attributes, self.right, strict=True)}
        return shares | {f"{name} (95 % lower bound)": wilson_lower(share, n) for name, share in shares.items()}


def wilson_lower(share: float, n: float, confidence: float = 0.95) -> float:
    """Lower end of the two-sided Wilson score interval of a share of n trials."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, spread = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (centre - spread) / (1 + z**2 / n)
