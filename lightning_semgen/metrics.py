"""What is measured over many batches: flow loss in bands of t, the channels of semantics, adherence to prompts."""

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor
from torchmetrics import Metric

from data.checker import Reading, read_scenes, read_video


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
    """Whether toy videos show what their prompts say, as the checker reads it.

    "colour", "shape" and "direction" are means over videos of the share of scenes in which that is right; of videos
    with several scenes, "scenes in order" is the share with exactly the prompt's scenes, every direction right.
    """

    attributes = ("colour", "shape", "direction")
    names = (*attributes, "scenes in order")

    def __init__(self):
        super().__init__()
        self.add_state("right", torch.zeros(len(self.attributes)), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("in_order", torch.zeros(2), dist_reduce_fx="sum")  # such videos, and those of several scenes

    def update(self, videos: Tensor, infos: Sequence[dict]) -> None:
        """videos uint8 (B, T, 3, H, W); infos name the attributes that each should show, or it is not counted.

        A video of several scenes has "directions" in place of "direction".
        """
        for video, info in zip(videos.cpu(), infos, strict=True):
            if not info.keys() >= {"colour", "shape"} or not (directions := directions_of(info)):
                continue
            found = [read_video(video)] if len(directions) == 1 else read_scenes(video)
            wanted = [Reading(info["colour"], info["shape"], direction) for direction in directions]
            self.right += torch.tensor(shares_right(found, wanted), device=self.right.device)
            self.count += 1
            if len(wanted) > 1:
                in_order = [reading.direction for reading in found] == directions
                self.in_order += torch.tensor([float(in_order), 1.0], device=self.in_order.device)

    def compute(self) -> dict[str, float]:
        """For each attribute the share, and the lower end of its 95 % Wilson interval; nothing without videos."""
        counted = [*((right, self.count) for right in self.right), self.in_order]
        shares = {
            name: ((right / n).item(), n.item()) for name, (right, n) in zip(self.names, counted, strict=True) if n > 0
        }
        lower = {f"{name} (95 % lower bound)": wilson_lower(*share) for name, share in shares.items()}
        return {name: share for name, (share, _) in shares.items()} | lower


def directions_of(info: dict) -> list[str]:
    """Of every scene of a toy video, in order."""
    return list(info.get("directions", [info["direction"]] if "direction" in info else []))


def shares_right(found: Sequence[Reading], wanted: Sequence[Reading]) -> list[float]:
    """For each attribute the share of the wanted scenes that have it right in their place."""
    pairs = list(zip(found, wanted, strict=False))
    return [sum(getattr(a, name) == getattr(b, name) for a, b in pairs) / len(wanted) for name in Adherence.attributes]


def wilson_lower(share: float, n: float, confidence: float = 0.95) -> float:
    """Lower end of the two-sided Wilson score interval of a share of n trials."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, spread = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (centre - spread) / (1 + z**2 / n)
