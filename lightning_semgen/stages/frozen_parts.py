"""What is frozen in a stage, and what it says of clips: the semantic encoder, the VAE, the text encoder."""

from collections.abc import Callable

import torch
from torch import Tensor

from data import random_numbers
from data.batch import Batch
from data.clip import Clip
from data.encoded.parts import Part
from encoders.base import Frozen
from encoders.text import build_text_encoder
from encoders.vae.base import build_vae
from lightning_semgen.errors import UserError
from lightning_semgen.stages.semantic_space import SemanticSpace


class FrozenParts:
    """Encoder, VAE and text encoder. They are outside the module tree, so in no checkpoint, EMA or optimiser.

    Args:
        clip: the nominal clip.
        space: None: there is no semantic encoder.
        encode_semantics: whether encoded shards hold the compressor's moments in place of features.
        text_encoder: "bytes", which is not frozen but learnt, or a name that `build_text_encoder` knows.
    """

    def __init__(self, clip: Clip, space: SemanticSpace | None, encode_semantics: bool, text_encoder: str):
        self.clip, self.space, self.encode_semantics = clip, space, encode_semantics
        self.text, self.text_name = build_text_encoder(text_encoder), text_encoder
        self.vae = self.vae_name = None
        if encode_semantics and (space is None or space.run is None):
            raise UserError(
                "model.encode_semantics keeps what a frozen compressor makes of features: name the run that learnt it"
                " as model.compressor."
            )

    def add_vae(self, name: str, weights: str | None) -> None:
        self.vae, self.vae_name = build_vae(name, weights), name

    @property
    def modules(self) -> list[Frozen]:
        encoder = None if self.space is None else self.space.encoder
        return [part for part in (self.text, encoder, self.vae) if isinstance(part, Frozen)]

    def to(self, device: torch.device | str) -> None:
        for part in self.modules:
            part.to(device)

    def share(self, other: "FrozenParts") -> None:
        """Takes the other's parts where they are the same, so that a device holds them once."""
        mine, theirs = self.fingerprint(), other.fingerprint()
        same = {name for name, value in mine.items() if theirs.get(name) == value}
        if {"text_encoder", "text_encoder_weights"} <= same:
            self.text = other.text
        if {"encoder", "encoder_options", "encoder_weights"} <= same:
            self.space.share_encoder(other.space)

    @property
    def needs_video(self) -> bool:
        """Whether frames at the full rate are needed, or those of the semantic stream will do."""
        return self.vae is not None or self.space is None or self.space.encoder.stream == "video"

    def fingerprint(self) -> dict:
        """The parts and the clip that encoded shards must have been made with."""
        facts = {}
        if self.space is not None:
            facts = self.space.source | {"compressor": self.space.loaded if self.encode_semantics else None}
        if not self.text.learnt:
            facts = facts | {"text_encoder": self.text_name, "text_encoder_weights": self.text.fingerprint()}
        if self.vae is not None:
            facts = facts | {"vae": self.vae_name, "vae_weights": self.vae.fingerprint()}
        return facts | {"clip": vars(self.clip)}

    def check_trained_with(self, found: dict) -> None:
        """UserError if a checkpoint's fingerprint names other weights than those of these parts."""
        for name, value in self.fingerprint().items():
            if name.endswith("_weights") and found.get(name) != value:
                raise UserError(
                    f"The checkpoint was trained with {name} {found.get(name)}, here they are {value}: give"
                    " the weights it was trained with, or train it again."
                )

    def prompt(self, batch: Batch, dropout: float = 0.0) -> Tensor:
        """The prompts of the generator (B, …), from the batch or by the text encoder; a share `dropout` is empty."""
        dropped = (random_numbers.uniform(batch["key"], "prompt dropout") < dropout).tolist()
        if "text" in batch and not self.text.learnt:
            rows = zip(dropped, batch["text"], strict=True)
            return self.text.pad([self.text.empty if drop else text for drop, text in rows])
        return self.text.prepare(["" if drop else c for drop, c in zip(dropped, batch["caption"], strict=True)])

    def latents(self, batch: Batch) -> Tensor:
        """(B, C, T_z, H_z, W_z), from the batch or by the VAE."""
        return batch["latents"] if "latents" in batch else self.vae.encode(batch["frames"])

    def precompute(self, batch: Batch, *only: str) -> dict[str, Tensor | list[Tensor]]:
        """What the parts, all or some, say of a batch of clips: {"features": (B, T', H', W', D), "text": B × (L, dim),
        …}."""
        return {name: make(batch) for name, make in self._makers.items() if not only or name in only}

    @property
    def _makers(self) -> dict[str, Callable[[Batch], Tensor | list[Tensor]]]:
        makers = {}
        if self.space is not None:
            name = self._semantic_name
            makers[name] = getattr(self.space, name)
        if not self.text.learnt:
            makers["text"] = lambda batch: self.text.embed(batch["caption"])
        if self.vae is not None:
            makers["latents"] = self.latents
        return makers

    @property
    def _semantic_name(self) -> str:
        return "moments" if self.encode_semantics else "features"

    @property
    def cut_parts(self) -> dict[str, Part]:
        """How latents and features of a clip are cut from those of a longer one."""
        parts = {}
        if self.space is not None:
            parts[self._semantic_name] = self.space.part_of(self.clip)
        if self.vae is not None:
            parts["latents"] = self._latent_part
        return parts

    @property
    def _latent_part(self) -> Part:
        steps, *_ = self.vae.grid(self.clip.num_frames, self.clip.height, self.clip.width)
        stride, rest = divmod(self.clip.period, self.vae.time_stride)
        own = self.vae.reach + 1  # where latents begin at every start of a clip
        return Part.of(1, steps, stride, steps if rest else own, 1 + self.vae.reach * self.vae.time_stride)
