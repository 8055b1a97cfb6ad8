"""What a metric of generated videos promises; a new one is a class in its own file and a row of `table.METRICS`."""

from collections.abc import Sequence

from torch import Tensor
from torchmetrics import Metric


class VideoMetric(Metric):
    """A torchmetrics metric of videos and what is known of them.

    Attributes:
        curves: values of `compute` that each validation logs, as <name in the table>/<value>.
        compared: those of them that stand in TensorBoard's table of runs.
    """

    curves: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()

    def update(self, videos: Tensor, infos: Sequence[dict]) -> None:
        """videos uint8 (B, T, 3, H, W), and the JSON of each sample, with its caption."""
        raise NotImplementedError

    def compute(self) -> dict[str, float]:
        """Values of all ranks by name; those that nothing was measured for are left out."""
        raise NotImplementedError
