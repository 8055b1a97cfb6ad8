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

from data.toy import COLOURS, DIRECTIONS, SHAPES, SIZES
from encoders.toy import pool_cells
from encoders.toy_vae import ToyVideoVAE

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


def sprite_centres(frames: Tensor) -> Tensor:
    """(B, T, 2): x, y of the saturated pixels' centre in frames (B, T, 3, H, W) in [0, 1]; the frame is -1 to 1."""
    height, width = frames.shape[-2:]
    weight = (frames.amax(2) - frames.amin(2) - 0.2).relu() + 1e-6
    x, y = (torch.linspace(1 / n - 1, 1 - 1 / n, n, device=frames.device) for n in (width, height))
    sums = torch.stack([(weight.sum(2) * x).sum(2), (weight.sum(3) * y).sum(2)], dim=2)
    return sums / weight.sum((2, 3))[..., None]


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
    """Masked autoencoding; attributes from the mean token; attributes and the sprite's place from every pooled token.

    Sprites are recoloured at random: in the train split, colour, direction and size say which shapes are unlikely, and
    a network finds that easier than looking. Small patches matter likewise: with 16 pixels shape is not learnt.
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
        mae_weight: float = 20.0,
        token_weight: float = 0.5,  # single tokens that tell a clip's attributes compress well
        place_weight: float = 5.0,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(lr, weight_decay)
        self.mask_ratio, self.cells = mask_ratio, cells
        self.weights = {"mae": mae_weight, "attributes": 1.0, "token_attributes": token_weight, "place": place_weight}
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
        self.token_heads = deepcopy(self.heads)
        self.place = nn.Linear(width, 4)  # x, y in the two frames of the token's tubelet
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

    def attribute_loss(self, tokens: Tensor, labels: dict[str, Tensor], heads: nn.ModuleDict) -> Tensor:
        """Cross entropy of tokens (B, N, width), each to tell the attributes of its clip."""
        return sum(
            F.cross_entropy(heads[name](tokens).transpose(1, 2), truth[:, None].expand(-1, tokens.shape[1]))
            for name, truth in labels.items()
        )

    def place_loss(self, tokens: Tensor, frames: Tensor) -> Tensor:
        centres = sprite_centres(frames).unflatten(1, (-1, 2)).flatten(2)  # (B, T', 4)
        return F.mse_loss(self.place(tokens), centres.repeat_interleave(tokens.shape[1] // centres.shape[1], dim=1))

    def training_step(self, batch: dict, _: int) -> Tensor:
        frames, labels = batch["semantic_frames"] / 255, attribute_labels(batch["info"], self.device)
        frames, labels["colour"] = recolour(frames, labels["colour"])
        tokens = self.tokens(frames)
        losses = {
            "mae": self.autoencoder(self.normalise(frames), self.mask(len(frames))).loss,
            "attributes": self.attribute_loss(tokens.mean(1, keepdim=True), labels, self.heads),
            "token_attributes": self.attribute_loss(tokens, labels, self.token_heads),
            "place": self.place_loss(tokens, frames),
        }
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=len(frames))
        return sum(self.weights[name] * loss for name, loss in losses.items())

    def validation_step(self, batch: dict, _: int) -> None:
        frames, labels = batch["semantic_frames"] / 255, attribute_labels(batch["info"], self.device)
        pooled = self.tokens(frames).mean(1)
        for name, truth in labels.items():
            accuracy = (self.heads[name](pooled).argmax(1) == truth).float().mean()
            self.log(f"val/{name}_accuracy", accuracy, batch_size=len(frames))

    def trained(self) -> nn.Module:
        return self.autoencoder.videomae
