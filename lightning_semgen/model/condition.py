"""What the velocity depends on beside z_t and t: a prompt and, in context, semantic tokens."""

from dataclasses import dataclass

from torch import Tensor

from lightning_semgen.model.positions import Grid


@dataclass
class SemanticTokens:
    """Semantic tokens in context: z (B, T', H', W', d), already noised to the flow's times tau (B,)."""

    z: Tensor
    tau: Tensor
    grid: Grid


@dataclass
class Condition:
    """A prompt and, unless the generator takes none, semantic tokens.

    `text` is what the text encoder reads, (B, L) ids or (B, L, text_dim) embeddings, before it has read them, and
    (B, L, text_dim) after.
    """

    text: Tensor
    semantics: SemanticTokens | None = None
