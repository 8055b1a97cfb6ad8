"""Networks filled from published weights: every tensor from the file, nothing left over, or an error with its cause."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from encoders.base import on_meta
from encoders.published.checkpoint import Checkpoint
from lightning_semgen.errors import UserError

SHOWN = 3  # names in an error


@dataclass(frozen=True)
class FileLayout:
    """How the tensors of a published file become ours.

    Attributes:
        anchor: the end of one tensor's name; what stands before it in the file is the prefix of all.
        read: one of our names and the file's `Tensors` to our tensor.
        ignorable: pattern of names that belong to something else: head, decoder, predictor, language model.
    """

    anchor: str
    read: Callable[[str, "Tensors"], Tensor]
    ignorable: str


def build_network(
    build: Callable[[], nn.Module],
    checkpoint: Checkpoint | None,
    layouts: tuple[FileLayout, ...],
    dtype: torch.dtype,
    source: str = "",
) -> nn.Module:
    """The network that `build` makes, with the checkpoint's weights in `dtype`; without one, with random weights.

    Args:
        layouts: those that the family's files come in.
        source: what the prefix must begin with, where a file holds several encoders.
    """
    if on_meta():
        return build() if dtype == torch.get_default_dtype() else build().to(dtype)
    if checkpoint is None:
        rank_zero_warn("The encoder has random weights: its features mean nothing.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same features in every process
            return build().to(dtype)
    with torch.device("meta"):
        network = build()
    layout, prefix = _recognise(checkpoint, layouts, source)
    load_strictly(network, checkpoint, layout, prefix, dtype)
    rank_zero_info(f"Encoder weights: {prefix}* of {checkpoint.path}")
    return network


def _recognise(checkpoint: Checkpoint, layouts: tuple[FileLayout, ...], source: str) -> tuple[FileLayout, str]:
    for layout in layouts:
        found = [name.removesuffix(layout.anchor) for name in checkpoint if name.endswith(layout.anchor)]
        prefixes = [prefix for prefix in found if prefix.startswith(source)] if len(found) > 1 else found
        if len(prefixes) == 1:
            return layout, prefixes[0]
        if found:
            wanted = f", and none or several begin with the source {source!r}" if source else ""
            raise UserError(f"{checkpoint.path} holds several encoders, {', '.join(found)}{wanted}: save one alone.")
    anchors = " or ".join(f"…{layout.anchor}" for layout in layouts)
    raise UserError(
        f"{checkpoint.path} is of another family: it has no tensor {anchors}, but {_some(list(checkpoint))}."
    )


class Tensors:
    """A checkpoint's tensors by their names after the prefix; remembers which were asked for."""

    def __init__(self, checkpoint: Checkpoint, prefix: str):
        self.checkpoint, self.prefix, self.used = checkpoint, prefix, set()

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.checkpoint

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(self.prefix + name)
        self.used.add(self.prefix + name)
        return self.checkpoint[self.prefix + name]


def load_strictly(
    network: nn.Module, checkpoint: Checkpoint, layout: FileLayout, prefix: str, dtype: torch.dtype
) -> None:
    """Every tensor of the network from the file, and nothing in the file left over; else a UserError with the cause."""
    checkpoint.require(prefix)
    tensors, state, missing, mismatched = Tensors(checkpoint, prefix), {}, [], []
    for name, parameter in network.state_dict().items():
        try:
            tensor = layout.read(name, tensors)
        except KeyError as error:
            missing.append(error.args[0])
            continue
        if tensor.shape == parameter.shape:
            state[name] = tensor.to(dtype, copy=True)  # not a view of the mapped file
        else:
            mismatched.append(f"{name} {tuple(tensor.shape)} instead of {tuple(parameter.shape)}")
    unexpected = [
        name
        for name in checkpoint
        if name not in tensors.used and not re.search(layout.ignorable, name.removeprefix(prefix))
    ]
    if missing or mismatched or unexpected:
        raise UserError(_complaint(checkpoint.path, missing, mismatched, unexpected, len(state)))
    network.load_state_dict(state, assign=True)


def _complaint(path: Path, missing: list[str], mismatched: list[str], unexpected: list[str], good: int) -> str:
    wrong = {"lacks": missing, "has another shape of": mismatched, "has the unknown": unexpected}
    found = "; it ".join(f"{verb} {_some(names)}" for verb, names in wrong.items() if names)
    return f"{path} does not fit: it {found}. {_cause(missing, mismatched, unexpected, good)}"


def _cause(missing: list[str], mismatched: list[str], unexpected: list[str], good: int) -> str:
    numbered = re.compile(r"(blocks|layers?)[._]\d+")
    if mismatched or all(numbered.search(name) for name in missing + unexpected):
        return (
            "It is of another size: take that size's row, or give width, depth, heads, mlp, patch, frames and size as"
            " options."
        )
    if len(missing) > good:
        return "It is of another family, or of another version of this one."
    if any(re.search("decoder|mask_token|predictor|head", name) for name in unexpected):
        return "It is a pretraining file, with parts that this family's published files do not have."
    return "It is of another version of this family, or was saved in part."


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
