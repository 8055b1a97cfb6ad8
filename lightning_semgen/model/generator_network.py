"""What a stage trains: the transformer and, if it is learnt, the text encoder."""

from dataclasses import replace

from torch import Tensor, nn

from lightning_semgen.model.condition import Condition
from lightning_semgen.model.transformer import VideoTransformer


class GeneratorNetwork(nn.Module):
    """Predicts the velocity of z (B, C, T, H, W), given a `Condition` whose text is not yet embedded."""

    def __init__(self, text: nn.Module, transformer: VideoTransformer):
        super().__init__()
        self.text, self.transformer = text, transformer

    def read(self, condition: Condition) -> Condition:
        """Embeds the text of a condition; sampling does this once for all steps."""
        return replace(condition, text=self.text(condition.text))

    def forward(self, z: Tensor, t: Tensor, condition: Condition, seconds: tuple[float, ...]) -> Tensor:
        return self.transformer(z, t, self.read(condition), seconds)
