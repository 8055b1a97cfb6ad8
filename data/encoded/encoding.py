"""What one model's frozen parts make of clips, as the samples of encoded shards."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.clip import Clip
from data.encoded.parts import Part
from data.encoded.shards import check_fingerprint, encoded_paths, to_bytes
from data.shards.index import index_path, write_atomically
from data.shards.reader import Shards

Encode = Callable[..., dict[str, Tensor | list[Tensor]]]


@dataclass(frozen=True)
class Encoding:
    """How the frozen parts of one stage encode clips: the folder of the shards, their fingerprint, and the function.

    `encode(batch, *only)` makes of a batch of a `ClipDataset` all or some of its `PARTS`: {"features": (B, …),
    "text": B × (L, dim), …}.
    """

    folder: Path
    fingerprint: dict
    encode: Encode

    def prepare(self) -> None:
        """Makes the folder with its fingerprint; UserError if it holds shards with another fingerprint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "fingerprint.json").exists():
            check_fingerprint(self.folder, self.fingerprint)
        else:
            write_atomically(self.folder / "fingerprint.json", json.dumps(self.fingerprint, indent=1))

    def missing(self, shards: Shards, share: list[int]) -> dict[int, Path]:
        """The shards of a share that are not encoded yet, by their number, and where they will be."""
        paths = encoded_paths(shards, self.folder)
        return {number: paths[number] for number in share if not index_path(paths[number]).exists()}

    def samples(self, batch: dict) -> Iterator[dict]:
        parts = {f"{name}.npy": value for name, value in self.encode(batch).items()}
        for row, info in enumerate(batch["info"]):
            arrays = {name: to_bytes(value[row]) for name, value in parts.items()}
            yield {"__key__": batch["sample"][row], "json": info, **arrays}


@dataclass(frozen=True)
class StretchEncoding(Encoding):
    """An `Encoding` of `Stretches`, one at a time. Clips are cut from the stored `parts`."""

    clip: Clip
    parts: dict[str, Part]
    batch_size: int

    def samples(self, batch: dict) -> Iterator[dict]:
        (starts,), (info,), (key,) = batch["starts"], batch["info"], batch["sample"]
        whole = self.encode(batch, "text", *(name for name, part in self.parts.items() if part.is_cut))
        arrays = {}
        for name, part in self.parts.items():
            pieces = whole.pop(name)[0].split(part.stride, part.axis) if part.is_cut else []
            arrays |= {f"{name}.{number}.npy": to_bytes(piece) for number, piece in enumerate(pieces)}
            for first in range(0, len(starts) if part.own else 0, self.batch_size):
                numbers = range(first, min(first + self.batch_size, len(starts)))
                made = self.encode(self._clips(batch, numbers, part.frames), name)[name]
                names = [f"{name}.{part.own_name(number)}" for number in numbers]
                arrays |= {file: to_bytes(own) for file, own in zip(names, made, strict=True)}
        arrays |= {f"{name}.npy": to_bytes(rows[0]) for name, rows in whole.items()}
        yield {"__key__": key, "json": info | {"starts": starts}, **arrays}

    def _clips(self, batch: dict, starts: Iterable[int], frames: int | None) -> dict[str, Tensor]:
        """Both streams of the clips at some starts, as a batch, or of those only the first `frames` frames."""
        clip = self.clip
        slices = {
            "frames": (clip.period, frames or clip.num_frames),
            "semantic_frames": (clip.semantic_period, len(clip.semantic_indices)),
        }
        return {
            name: torch.stack([batch[name][0, start * every : start * every + length] for start in starts])
            for name, (every, length) in slices.items()
            if name in batch
        }
