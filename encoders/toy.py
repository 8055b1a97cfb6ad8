"""The embedded encoder: a tiny VideoMAE, transformers' own class, trained by configs/toy/encoder.yaml."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VideoMAEModel

from encoders.base import FrozenEncoder
from lightning_semgen.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pool_cells(tokens: Tensor, cells: int) -> Tensor:
    """Tokens (B, T', H', W', D) averaged over blocks of space to (B, T', cells, cells, D)."""
    pooled = F.adaptive_avg_pool2d(tokens.flatten(0, 1).movedim(-1, 1), cells)
    return pooled.movedim(1, -1).unflatten(0, tokens.shape[:2])


class ToyEncoder(FrozenEncoder):
    """VideoMAE on windows of `config.num_frames` frames, squashed to the trained square; tokens pooled to 3×3 cells.

    Windows are independent; the last is filled up by repeating its final frame, and the surplus is cut.
    """

    def __init__(self, weights: str, cells: int = 3, layer: int = 3):
        super().__init__()
        try:
            with torch.device("cpu"):  # also where the rest of a stage is built on meta
                self.model = VideoMAEModel.from_pretrained(weights, dtype=torch.float32)
        except OSError as error:
            raise UserError(f"There are no VideoMAE weights (config.json, model.safetensors) in {weights}.") from error
        config = self.model.config
        self.dim, self.tubelet = config.hidden_size, config.tubelet_size
        self.window = self.block = config.num_frames
        self.side = config.image_size
        self.layer = layer  # of 4; the last says the same in every cell, the sprite's place is in the earlier ones
        self.patches, self.cells = config.image_size // config.patch_size, cells
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return frames // self.tubelet, self.cells, self.cells

    def preprocess(self, frames: Tensor) -> Tensor:
        pixels = frames.flatten(0, 1).to(self.mean.dtype) / 255
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
        return ((pixels - self.mean) / self.std).unflatten(0, frames.shape[:2])

    def features(self, pixels: Tensor) -> Tensor:
        batch, steps = len(pixels), pixels.shape[1] // self.tubelet
        surplus = -pixels.shape[1] % self.window
        pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, surplus, -1, -1, -1)], dim=1)
        windows = pixels.unflatten(1, (-1, self.window)).flatten(0, 1)
        tokens = self.model(windows, output_hidden_states=True).hidden_states[self.layer]
        tokens = tokens.reshape(batch, -1, self.patches, self.patches, self.dim)[:, :steps]
        return pool_cells(tokens, self.cells)
