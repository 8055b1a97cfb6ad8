"""The semantic space of a stage: frozen encoder, compressor and statistics, from a batch to standardised semantics."""

from math import ceil

import torch
from torch import Tensor, nn

from data.clip import Clip
from encoders import build_encoder
from encoders.base import FrozenEncoder
from lightning_semgen import keyed
from lightning_semgen.compressor import Compressor, Posterior
from lightning_semgen.errors import UserError
from lightning_semgen.positions import Grid
from lightning_semgen.runs import load_checkpoint

MEASURED_CLIPS = 2048  # over which the statistics are measured when the compressor freezes


class SemanticSpace(nn.Module):
    """Batches to semantics z_sem (B, T', H', W', d).

    Args:
        clip: the nominal clip, which gives `grid`.
        encoder: a row of `encoders.ENCODERS` other than "none".
        options: the encoder's own.
        dim: d; None: no compression.
        run: folder of the run whose compressor is loaded and frozen; None: it is learnt.
    """

    def __init__(self, clip: Clip, encoder: str, options: dict, dim: int | None, run: str | None):
        super().__init__()
        self._frozen = (build_encoder(encoder, **options),)  # a tuple hides it from the module tree
        frames, times = (clip.num_frames, clip.times)
        if self.encoder.stream == "semantic":
            frames, times = len(clip.semantic_times), clip.semantic_times
        _, height, width = self.encoder.grid(frames, clip.height, clip.width)
        self.grid = Grid(tuple(self.encoder.seconds(times).tolist()), height, width)
        self.compressor = Compressor(self.encoder.dim, dim)
        self.facts = {"encoder": encoder, "semantic_dim": dim, "grid": [height, width]}
        self.run = run
        if run is not None:
            self._load_compressor(run)

    @property
    def encoder(self) -> FrozenEncoder:
        return self._frozen[0]

    @property
    def channels(self) -> int:
        """d, or D without compression."""
        return self.compressor.channels

    def _load_compressor(self, run: str) -> None:
        checkpoint = load_checkpoint(run)
        for name, value in self.facts.items():
            if (found := checkpoint["semantics"].get(name)) != value:
                raise UserError(
                    f"The compressor in {run} was trained with {name} {found}, this config says {value}:"
                    " change model.compressor or the config."
                )
        prefix = "space.compressor."
        state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        self.compressor.load_state_dict(state)
        self.compressor.requires_grad_(False)

    def same_as(self, other: "SemanticSpace") -> bool:
        """Whether both give the same semantics: equal compressors and statistics."""
        mine, theirs = self.state_dict(), other.state_dict()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k].to(mine[k])) for k in mine)

    def features(self, batch: dict) -> Tensor:
        """(B, T', H', W', D), from the batch or by the encoder."""
        if "features" in batch:
            return batch["features"]
        return self.encoder(batch["semantic_frames" if self.encoder.stream == "semantic" else "frames"])

    def posterior(self, features: Tensor, keys: Tensor) -> Posterior:
        noise = keyed.normal(keys, "posterior", *features.shape[1:-1], self.channels)
        return self.compressor.posterior(features, noise)

    def forward(self, batch: dict) -> Tensor:
        """Standardised samples z_sem (B, T', H', W', d)."""
        return self.compressor.standardise(self.posterior(self.features(batch), batch["key"]).z)

    @torch.no_grad()
    def measure(self, batches, batch_size: int) -> None:
        """Measures the statistics anew over `MEASURED_CLIPS` clips on all ranks together."""
        self.compressor.standardise.reset()
        for _, batch in zip(range(ceil(MEASURED_CLIPS / batch_size)), batches, strict=False):
            self.compressor.standardise.observe(self.posterior(self.features(batch), batch["key"]).z)
        self.compressor.standardise.update()
