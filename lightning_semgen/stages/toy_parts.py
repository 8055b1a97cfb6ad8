"""Training of the embedded frozen parts, a tiny video VAE and a tiny video encoder, on the toy world."""

from copy import deepcopy
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForPreTraining
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from data.toy.world import COLOURS, DIRECTIONS, SHAPES, SIZES
from encoders.toy import pool_cells
from encoders.vae.toy import ToyVideoVAE

ATTRIBUTES = {"colour": list(COLOURS), "shape": list(SHAPES), "direction": list(DIRECTIONS), "size": list(SIZES)}


def psnr(shown: Tensor, true: Tensor) -> Tensor:
    """Decibels per clip (B) of frames (B, 3, T, H, W) in [-1, 1], rounded to uint8 as they would be on disk."""
    error = ((shown.clamp(-1, 1) - true) * 127.5).round().square().flatten(1).mean(1)
    return 20 * torch.log10(255 / error.sqrt())


def attribute_labels(info: list[dict], device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.tensor([values.index(row[name]) for row in info], device=device)
        for name, values in ATTRIBUTES.items()
    }


def hues() -> Tensor:
    """Angle of each of COLOURS around the grey axis of the RGB cube."""
    red, green, blue = torch.tensor([*COLOURS.values()]).unbind(1)
    return torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)


def recolour(frames: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Clips (B, T, 3, H, W) in [0, 1] of sprites of these colours (B) turned to random others; grey stays grey."""
    wanted = torch.randint_like(colours, len(COLOURS))
    angle = (hues().to(frames)[wanted] - hues().to(frames)[colours])[:, None, None]
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(frames) / 3**0.5
    turn = angle.cos() * torch.eye(3).to(frames) + (1 - angle.cos()) / 3 + angle.sin() * cross
    return torch.einsum("bij,btjhw->btihw", turn, frames).clamp(0, 1), wanted


class ToyPart(LightningModule):
    """AdamW, one cycle; the end of the fit writes the part `trained()` as fp16 to <default_root_dir>/weights."""

    def __init__(self, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay

    def trained(self) -> nn.Module:
        raise NotImplementedError

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.trainer.max_steps, pct_start=0.05
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @rank_zero_only
    def on_fit_end(self) -> None:
        part = deepcopy(self.trained()).half()
        part.save_pretrained(Path(self.trainer.default_root_dir) / "weights")


class ToyVAETraining(ToyPart):
    """Reconstruction, above all of what is colourful, with a small KL so that latents stay smooth."""

    needs_video = True

    def __init__(
        self,
        z_dim: int = 12,
        channels: tuple[int, int, int] = (32, 48, 80),
        piece: int = 17,  # frames of a clip that one step sees, 4k + 1
        colour_weight: float = 3.0,  # of a fully saturated pixel beside a grey one: sprites are few pixels
        kl_weight: float = 1e-3,  # on the mean over latents, as the error is the mean over pixels
        statistics_batches: int = 64,
        lr: float = 2e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(lr, weight_decay)
        self.vae = ToyVideoVAE(z_dim, channels)
        self.piece, self.statistics_batches = piece, statistics_batches
        self.colour_weight, self.kl_weight = colour_weight, kl_weight

    def pixels(self, batch: dict) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1]."""
        return batch["frames"].to(self.device).movedim(1, 2) / 127.5 - 1

    def training_step(self, batch: dict, _: int) -> Tensor:
        frames = self.pixels(batch)
        start = int(torch.randint(frames.shape[2] - self.piece + 1, ()))
        frames = frames[:, :, start : start + self.piece]
        latents = self.vae.encode(frames).latent_dist
        saturation = (frames.amax(1, keepdim=True) - frames.amin(1, keepdim=True)) / 2
        squares = (self.vae.decode(latents.sample()).sample - frames).square()
        error = ((1 + self.colour_weight * saturation) * squares).mean()
        kl = (latents.mean.square() + latents.var - 1 - latents.logvar).mean() / 2
        self.log_dict({"train/mse": squares.mean(), "train/kl": kl}, batch_size=len(frames))
        return error + self.kl_weight * kl

    def validation_step(self, batch: dict, _: int) -> None:
        frames = self.pixels(batch)
        shown = self.vae.decode(self.vae.encode(frames).latent_dist.mode()).sample
        self.log("val/psnr", psnr(shown, frames).mean(), batch_size=len(frames))

    @torch.no_grad()
    def trained(self) -> ToyVideoVAE:
        batches = islice(self.trainer.train_dataloader, self.statistics_batches)
        latents = torch.cat([self.vae.encode(self.pixels(batch)).latent_dist.mode() for batch in batches])
        latents = latents.transpose(0, 1).flatten(1)
        self.vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
        return self.vae


class ToyEncoderTraining(ToyPart):
    """Masked autoencoding, and the clip's attributes from the mean of its tokens.

    From the mean alone: a token that has to tell them by itself says nothing of its own place. Sprites are recoloured
    at random: in the train split, colour, direction and size say which shapes are unlikely, and a network finds that
    easier than looking. Small patches matter likewise: with 16 pixels shape is hardly learnt.
    """

    needs_video = False

    def __init__(
        self,
        image_size: int = 48,
        patch_size: int = 8,
        num_frames: int = 4,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        cells: int = 3,  # side of the pooled grid
        mask_ratio: float = 0.75,
        mae_weight: float = 50.0,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(lr, weight_decay)
        self.mask_ratio, self.cells = mask_ratio, cells
        self.mae_weight = mae_weight
        config = VideoMAEConfig(
            image_size=image_size,
            patch_size=patch_size,
            num_frames=num_frames,
            tubelet_size=2,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=2 * width,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=heads,
            decoder_intermediate_size=2 * width,
            use_mean_pooling=False,
            norm_pix_loss=False,
            initializer_range=0.05,
        )
        self.autoencoder = VideoMAEForPreTraining(config)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1), persistent=False)

    def normalise(self, frames: Tensor) -> Tensor:
        """Frames in [0, 1], as VideoMAE expects them."""
        return (frames - self.mean) / self.std

    def tokens(self, frames: Tensor) -> Tensor:
        """Pooled tokens (B, N, width) of frames (B, T_s, 3, H, W) in [0, 1], after the final LayerNorm."""
        config = self.autoencoder.config
        side = config.image_size // config.patch_size
        tokens = self.autoencoder.videomae(self.normalise(frames)).last_hidden_state
        return pool_cells(tokens.unflatten(1, (-1, side, side)), self.cells).flatten(1, 3)

    def mask(self, count: int) -> Tensor:
        """(count, N), true where hidden; as many in every row."""
        patches = self.autoencoder.videomae.embeddings.num_patches
        order = torch.rand(count, patches, device=self.device).argsort(1)
        return order < round(self.mask_ratio * patches)

    def training_step(self, batch: dict, _: int) -> Tensor:
        frames, labels = batch["semantic_frames"] / 255, attribute_labels(batch["info"], self.device)
        frames, labels["colour"] = recolour(frames, labels["colour"])
        mean = self.tokens(frames).mean(1)
        attributes = sum(F.cross_entropy(self.heads[name](mean), truth) for name, truth in labels.items())
        hidden = self.autoencoder(self.normalise(frames), self.mask(len(frames))).loss
        self.log_dict({"train/mae": hidden, "train/attributes": attributes}, batch_size=len(frames))
        return self.mae_weight * hidden + attributes

    def validation_step(self, batch: dict, _: int) -> None:
        frames, labels = batch["semantic_frames"] / 255, attribute_labels(batch["info"], self.device)
        pooled = self.tokens(frames).mean(1)
        for name, truth in labels.items():
            accuracy = (self.heads[name](pooled).argmax(1) == truth).float().mean()
            self.log(f"val/{name}_accuracy", accuracy, batch_size=len(frames))

    def trained(self) -> nn.Module:
        return self.autoencoder.videomae
