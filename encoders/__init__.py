"""The registry of frozen semantic encoders: one table, one function."""

from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path

from encoders.base import FrozenEncoder
from lightning_semgen.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"  # of the embedded parts


@dataclass(frozen=True)
class Row:
    """Where an encoder's adapter is, which weights it takes by default, and their licence."""

    adapter: str
    weights: str | None
    licence: str


ENCODERS: dict[str, Row | None] = {
    "toy": Row(
        "encoders.toy:ToyEncoder",
        str(WEIGHTS / "toy_encoder"),
        "Apache-2.0, trained here on the toy world",
    ),
    "vae": Row("encoders.vae:VAEEncoder", None, "that of the VAE"),
    "none": None,  # no semantics: LatentStage becomes the one-stage baseline
}


def build_encoder(name: str, weights: str | None = None, **overrides) -> FrozenEncoder | None:
    """The encoder of that name, frozen; None for "none".

    Args:
        name: a key of `ENCODERS`; an unknown one is a UserError that lists them.
        weights: a folder or hub id to load instead of the row's own weights.
        overrides: the adapter's own options.
    """
    if name not in ENCODERS:
        raise UserError(f"There is no encoder {name!r}; known encoders: {', '.join(ENCODERS)}.")
    row = ENCODERS[name]
    if row is None:
        return None
    module, adapter = row.adapter.split(":")
    adapter = getattr(import_module(module), adapter)
    if unknown := overrides.keys() - signature(adapter).parameters.keys():
        raise UserError(f"The encoder {name!r} has no option {', '.join(sorted(unknown))}: {signature(adapter)}.")
    return adapter(weights or row.weights, **overrides).freeze()
