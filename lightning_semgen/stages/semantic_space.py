"""The semantic space of a stage: frozen encoder, compressor and statistics, from a batch to standardised semantics."""

from functools import cached_property
from math import ceil

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from data import random_numbers
from data.batch import Batch
from data.clip import Clip
from data.encoded.parts import Part
from encoders import build_encoder
from encoders.base import FrozenEncoder, fingerprint
from lightning_semgen.errors import UserError
from lightning_semgen.model.compressor import Compressor, Posterior
from lightning_semgen.model.positions import Grid
from lightning_semgen.runs import load_checkpoint

MEASURED_CLIPS = 2048  # at most, over which the statistics are measured when the compressor freezes


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
        self.name, self.options, self.run = encoder, options, run
        self.grid = self.grid_of(clip)
        self.compressor = Compressor(self.encoder.dim, dim)
        self.loaded: str | None = None  # tells the loaded compressor from others
        if run is not None:
            self.compressor.requires_grad_(False)

    def grid_of(self, clip: Clip) -> Grid:
        """The tokens of a clip's semantics; UserError where the encoder makes none of it."""
        frames, times = clip.num_frames, clip.times
        if self.encoder.stream == "semantic":
            frames, times = len(clip.semantic_times), clip.semantic_times
        _, height, width = self.encoder.grid(frames, clip.height, clip.width)
        grid = Grid(tuple(self.encoder.seconds(times).tolist()), height, width)
        if not grid.seconds:
            raise UserError(
                f"The clip is too short for the encoder {self.name}: {frames} frames at {clip.semantic_fps:g} fps fill"
                f" no tubelet of {self.encoder.tubelet}; raise data.num_frames or data.semantic_fps."
            )
        return grid

    def part_of(self, clip: Clip) -> Part:
        """How a clip's features or moments are cut from those of a longer one."""
        steps, encoder = len(self.grid_of(clip).seconds), self.encoder
        frames = len(clip.semantic_indices) // encoder.tubelet * encoder.tubelet
        shared = encoder.block and frames % encoder.block == 0 and clip.semantic_period % encoder.block == 0
        return Part.of(0, steps, clip.semantic_period // encoder.tubelet, 0 if shared else steps)

    @cached_property
    def source(self) -> dict:
        """Everything that features depend on."""
        weights = self.encoder.fingerprint()
        return {"encoder": self.name, "encoder_options": self.options, "encoder_weights": weights}

    @property
    def facts(self) -> dict:
        """Everything that semantics depend on, except for the compressor's weights."""
        return self.source | {"semantic_dim": self.compressor.dim, "grid": [self.grid.height, self.grid.width]}

    @property
    def encoder(self) -> FrozenEncoder:
        return self._frozen[0]

    def share_encoder(self, other: "SemanticSpace") -> None:
        self._frozen = other._frozen

    @property
    def channels(self) -> int:
        """d, or D without compression."""
        return self.compressor.channels

    def load_compressor(self, run: str) -> None:
        """Loads the compressor of a run or checkpoint; UserError if it is of another kind or still learning."""
        prefix = "space.compressor."
        checkpoint = load_checkpoint(run, {f"state_dict.{prefix}{name}" for name in self.compressor.state_dict()})
        found = checkpoint["semantics"]
        for name, value in self.facts.items():
            if found.get(name) != value:
                raise UserError(
                    f"The compressor in {run} was trained with {name} {found.get(name)}, this config says {value}:"
                    " change model.compressor or the config."
                )
        if not found["frozen"]:
            raise UserError(
                f"The compressor in {run} is still being learnt at step {checkpoint['global_step']}: let that fit"
                " go on past its model.compressor_steps."
            )
        state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        self.compressor.load_state_dict(state)
        self.loaded = fingerprint(self.compressor)

    def check_same(self, other: "SemanticSpace", run: str) -> None:
        """UserError unless both give the same semantics at the same times."""
        if self.grid != other.grid:
            raise UserError(f"The semantics of {run} are on the grid {other.grid}, those of this run on {self.grid}.")
        mine = get_model_state_dict(self, options=StateDictOptions(full_state_dict=True))  # it may be sharded
        theirs = other.state_dict()
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[k], theirs[k].to(mine[k])) for k in mine):
            raise UserError(
                f"The compressor of {run} is not the one that this run was trained with, so their semantics do not"
                " fit: train this stage again on that run, or name the run it was trained with."
            )

    def features(self, batch: Batch) -> Tensor:
        """(B, T', H', W', D), from the batch or by the encoder."""
        if "features" in batch:
            return batch["features"]
        return self.encoder(batch["semantic_frames" if self.encoder.stream == "semantic" else "frames"])

    def moments(self, batch: Batch) -> Tensor:
        """μ and log σ² (B, T', H', W', 2d), from the batch or by encoder and compressor."""
        return batch["moments"] if "moments" in batch else self.compressor.moments(self.features(batch))

    def posterior(self, batch: Batch) -> Posterior:
        moments = self.moments(batch)
        noise = random_numbers.normal(batch["key"], "posterior", *moments.shape[1:-1], self.channels)
        return self.compressor.posterior(moments, noise)

    def sample(self, batch: Batch) -> tuple[Tensor, Posterior]:
        """Standardised samples z_sem (B, T', H', W', d), and what they are drawn from."""
        posterior = self.posterior(batch)
        return self.compressor.standardise(posterior.z), posterior

    def forward(self, batch: Batch) -> Tensor:
        """z_sem (B, T', H', W', d)."""
        return self.sample(batch)[0]

    @torch.no_grad()
    def measure(self, batches, clips: int, batch_size: int) -> None:
        """Measures the statistics again, over at most `MEASURED_CLIPS` of the `clips`, on all ranks together."""
        # The running statistics mix those of all compressors that this one has been while it learnt.
        self.compressor.standardise.reset()
        steps = tqdm(range(ceil(min(clips, MEASURED_CLIPS) / batch_size)), desc="measuring the semantics", leave=False)
        for _, batch in zip(steps, batches, strict=False):
            self.compressor.standardise.observe(self.posterior(batch).z)
        self.compressor.standardise.update()
