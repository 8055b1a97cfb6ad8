"""All metrics of generated videos: a row each."""

import torch

from lightning_semgen.evaluation.adherence import Adherence
from lightning_semgen.evaluation.video_metric import VideoMetric

METRICS: dict[str, type[VideoMetric]] = {"adherence": Adherence}
COMPARED = tuple(f"{name}/{value}" for name, metric in METRICS.items() for value in metric.compared)


def build_metrics(device: torch.device) -> dict[str, VideoMetric]:
    """One of each row, with nothing measured yet."""
    return {name: metric().to(device) for name, metric in METRICS.items()}
