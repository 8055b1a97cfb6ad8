"""The VAE of Wan 2.1 and 2.2, diffusers' own, from chunk to chunk of time and, where frames are large, in tiles."""

from collections import defaultdict
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn

from encoders.base import on_meta
from encoders.published.checkpoint import open_checkpoint
from encoders.published.loading import FileLayout, build_network
from lightning_semgen.errors import UserError

HUB_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
DOWNLOAD = f"`hf download {HUB_ID} --include 'vae/*'` (about 0.5 GB)"
LAYOUT = FileLayout("encoder.conv_in.weight", lambda name, file: file[name], ignorable=r"(?!)")
UNTILED = 1280 * 720  # pixels of the largest frame that goes through whole

Cache = list[Tensor | str | None]  # what diffusers' causal convolutions keep of the past, one entry each
Past = dict[tuple[int, int], Cache]  # by the corner of the tile


class WanVAE(AutoencoderKLWan):
    """Video (B, 3, 4k+1, H, W) in −1 to 1 and latents (B, z_dim, k+1, H/s, W/s), s 8 in Wan 2.1 and 16 in 2.2.

    A step of the past is kept in each layer, so that a chunk of one latent is all there is in memory.
    """

    chunk = 1

    @classmethod
    def load(cls, weights: str | None) -> "WanVAE":
        """From a folder or hub id in diffusers' format, of the VAE or of a pipeline with a `vae`; "random" for tests of
        everything else."""
        if weights == "random" or on_meta():
            return build_network(cls, None, (), torch.float32)
        checkpoint = open_checkpoint(weights or HUB_ID, download=None if weights else DOWNLOAD, subfolder="vae")
        config = checkpoint.json("config.json")
        if config.get("_class_name") != AutoencoderKLWan.__name__:
            raise UserError(
                f"{checkpoint.path} is no Wan VAE: its config.json must name the class {AutoencoderKLWan.__name__}, not"
                f" {config.get('_class_name')}."
            )
        return build_network(lambda: cls.from_config(config), checkpoint, (LAYOUT,), torch.float32)

    @property
    def reach(self) -> int:
        """28 of the published ones: a convolution over three steps of time looks two back, at the rate of its level."""
        frames, rate = 0, 1
        for module in self.encoder.modules():
            if isinstance(module, WanCausalConv3d):
                frames += (module.kernel_size[0] - 1) * rate
                rate *= module.stride[0]
        return -(-frames // rate)

    def encode_chunk(self, video: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """The first chunk is one frame, each next one four."""
        past = defaultdict(lambda: empty_cache(self.encoder)) if past is None else past
        tiled, patch = video[0, 0, 0].numel() > UNTILED, self.config.patch_size
        moments = self._by_tiles(
            lambda tile, cache: self.quant_conv(self.encoder(tile, cache, [0])),
            video if patch is None else patchify(video, patch),
            past,
            (self.tile_sample_min_height, self.tile_sample_stride_height) if tiled else None,
            (patch or 1) / self.config.scale_factor_spatial,
        )
        return moments.chunk(2, dim=1)[0], past

    def decode_chunk(self, latents: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        """The first latent becomes one frame, each next one four."""
        first, past = past is None, defaultdict(lambda: empty_cache(self.decoder)) if past is None else past
        side, patch = self.config.scale_factor_spatial, self.config.patch_size
        tiled = latents[0, 0, 0].numel() * side**2 > UNTILED
        video = self._by_tiles(
            lambda tile, cache: self.decoder(self.post_quant_conv(tile), cache, [0], first_chunk=first),
            latents,
            past,
            (self.tile_sample_min_height // side, self.tile_sample_stride_height // side) if tiled else None,
            side / (patch or 1),
        )
        return video if patch is None else unpatchify(video, patch), past

    def _by_tiles(
        self, run: Callable[[Tensor, Cache], Tensor], x: Tensor, past: Past, tiles: tuple[int, int] | None, scale: float
    ) -> Tensor:
        """`run` on overlapping tiles of x, blended as diffusers does.

        Args:
            tiles: their side and stride; None: x is one tile.
            scale: the output's side by the input's.
        """
        side, stride = tiles or (max(x.shape[-2:]),) * 2
        overlap, kept, rows = round((side - stride) * scale), round(stride * scale), []
        for top in range(0, x.shape[-2], stride):
            row = []
            for left in range(0, x.shape[-1], stride):
                tile = run(x[..., top : top + side, left : left + side], past[top, left])
                if rows:
                    tile = self.blend_v(rows[-1][len(row)], tile, overlap)
                if row:
                    tile = self.blend_h(row[-1], tile, overlap)
                row.append(tile)
            rows.append(row)
        return torch.cat([torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1) for row in rows], dim=-2)


def empty_cache(network: nn.Module) -> Cache:
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in network.modules())
