"""Whether toy videos show what their prompts say."""

from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from data.toy.checker import NONE, Reading, read_scenes, read_video
from data.toy.world import COLOURS, DIRECTIONS, SHAPES
from lightning_semgen.evaluation.video_metric import VideoMetric


class Adherence(VideoMetric):
    """Whether toy videos show what their prompts say, as the checker reads it.

    "colour", "shape" and "direction" are means over videos of the share of scenes in which that is right; of videos
    with several scenes, "scenes in order" is the share with exactly the prompt's scenes, every direction right.
    """

    attributes = ("colour", "shape", "direction")
    names = curves = (*attributes, "scenes in order")
    compared = attributes

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
            if not (directions := directions_of(info)) or not _known(info.get("colour"), info.get("shape")):
                continue
            found = [read_video(video)] if len(directions) == 1 else read_scenes(video)
            wanted = [Reading(info["colour"], info["shape"], direction) for direction in directions]
            self.right += torch.tensor(shares_right(found, wanted), device=self.right.device)
            self.count += 1
            if len(wanted) > 1:
                in_order = [reading.direction for reading in found] == directions
                self.in_order += torch.tensor([float(in_order), 1.0], device=self.in_order.device)

    def compute(self) -> dict[str, float]:
        """The share for each attribute, and the lower end of its 95 % Wilson interval; empty without videos."""
        counted = [*((right, self.count) for right in self.right), self.in_order]
        shares = {
            name: ((right / n).item(), n.item()) for name, (right, n) in zip(self.names, counted, strict=True) if n > 0
        }
        lower = {f"{name} (95 % lower bound)": wilson_lower(*share) for name, share in shares.items()}
        return {name: share for name, (share, _) in shares.items()} | lower


def directions_of(info: dict) -> list[str]:
    """The direction of every scene of a toy video, in order; none if the JSON of others has other values there."""
    found = info.get("directions", [info.get("direction")])
    directions = list(found) if isinstance(found, list | tuple) else []
    return directions if all(way in (*DIRECTIONS, NONE) for way in directions) else []


def _known(colour: object, shape: object) -> bool:
    return colour in (*COLOURS, NONE) and shape in (*SHAPES, NONE)


def shares_right(found: Sequence[Reading], wanted: Sequence[Reading]) -> list[float]:
    """For each attribute, the share of wanted scenes whose counterpart at the same place has it right."""
    pairs = list(zip(found, wanted, strict=False))
    return [sum(getattr(a, name) == getattr(b, name) for a, b in pairs) / len(wanted) for name in Adherence.attributes]


def wilson_lower(share: float, n: float, confidence: float = 0.95) -> float:
    """Lower end of the two-sided Wilson score interval of a share of n trials."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre, spread = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (centre - spread) / (1 + z**2 / n)
