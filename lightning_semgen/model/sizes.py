"""Named sizes of the transformer."""

from dataclasses import dataclass

from lightning_semgen.errors import UserError


@dataclass(frozen=True)
class Size:
    """Width, number of blocks, heads and hidden width of the feed-forward layers."""

    dim: int
    depth: int
    heads: int
    ffn_dim: int


SIZES = {
    "toy": Size(128, 4, 4, 384),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "1.3B": Size(1536, 30, 12, 8960),
    "14B": Size(5120, 40, 40, 13824),
}


def size_of(name: str) -> Size:
    """The row of `SIZES`; UserError lists the known names."""
    if name not in SIZES:
        raise UserError(f"There is no transformer size {name!r}; known sizes: {', '.join(SIZES)}.")
    return SIZES[name]
