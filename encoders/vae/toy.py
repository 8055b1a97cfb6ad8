"""A tiny causal video VAE with the interface of diffusers' video VAEs, for the toy world."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

GROUP = 4  # frames per latent step; the first step has seen one frame


class Conv(nn.Conv2d):
    """A convolution of each step on its own: (B, K, C, H, W) → (B, K, C', H, W)."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def shift_in_time(x: Tensor) -> Tensor:
    """(B, K, C, H, W) with a quarter of the channels taken from the step before: free, causal time mixing."""
    past, present = x.split([x.shape[2] // 4, x.shape[2] - x.shape[2] // 4], dim=2)
    return torch.cat([F.pad(past[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), present], dim=2)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = Conv(channels, channels, 3)
        self.out = Conv(channels, channels, 3)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.silu(self.mix(F.silu(shift_in_time(x)))))


class ToyVideoVAE(ModelMixin, ConfigMixin):
    """Frames (B, 3, 4k+1, H, W) in [-1, 1] ↔ latents (B, z_dim, k+1, H/8, W/8).

    Everything runs at the latents' frame rate: four frames are stacked on channels, time is mixed by shifting channels.
    A chunk so needs one step of the past for each block.
    """

    chunk = 16

    @property
    def reach(self) -> int:
        return steps_back(self.encoder)

    @register_to_config
    def __init__(
        self,
        z_dim: int = 8,
        channels: tuple[int, int, int] = (32, 48, 80),  # at H/2 (decoder only), H/4, H/8
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scale_factor_temporal: int = 4,
        scale_factor_spatial: int = 8,
    ) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), Conv(GROUP * 3 * 16, middle, 1), Block(middle),
            nn.PixelUnshuffle(2), Conv(middle * 4, coarse, 1), Block(coarse), Block(coarse),
            nn.SiLU(), Conv(coarse, 2 * z_dim, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            Conv(z_dim, coarse, 3), Block(coarse), Block(coarse),
            Conv(coarse, middle * 4, 1), nn.PixelShuffle(2), Block(middle),
            Conv(middle, fine * 4, 1), nn.PixelShuffle(2), Block(fine),
            nn.SiLU(), Conv(fine, GROUP * 3 * 4, 3), nn.PixelShuffle(2),
        )  # fmt: skip

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        return AutoencoderKLOutput(latent_dist=self._posterior(torch.cat([self._before(x), x], dim=2)))

    def encode_chunk(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        x, steps = torch.cat([self._before(x) if past is None else past, x], dim=2), -(-x.shape[2] // GROUP)
        return self._posterior(x).mode()[:, :, -steps:], x[:, :, -GROUP * self.reach :]

    @staticmethod
    def _before(x: Tensor) -> Tensor:
        """What fills the first group up: its one frame, repeated."""
        return x[:, :, :1].expand(-1, -1, GROUP - 1, -1, -1)

    def _posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        moments = self.encoder(x.movedim(2, 1).unflatten(1, (-1, GROUP)).flatten(2, 3))
        return DiagonalGaussianDistribution(moments.movedim(1, 2))

    def decode(self, z: Tensor) -> DecoderOutput:
        frames = self.decoder(z.movedim(2, 1)).unflatten(2, (GROUP, 3)).flatten(1, 2)
        return DecoderOutput(sample=frames[:, GROUP - 1 :].movedim(1, 2))

    def decode_chunk(self, z: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        steps, z = z.shape[2], z if past is None else torch.cat([past, z], dim=2)
        return self.decode(z).sample[:, :, -GROUP * steps :], z[:, :, -steps_back(self.decoder) :]


def steps_back(network: nn.Sequential) -> int:
    """Steps of the past that one step depends on: each block's shift adds one."""
    return sum(isinstance(layer, Block) for layer in network)
