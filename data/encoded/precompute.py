"""The pass that writes encoded shards: the frozen parts over all clips, on all ranks."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path

from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data.clip import Clip
from data.encoded.shards import check_fingerprint, encoded_paths, to_bytes
from data.rejected import Rejected, RejectionCount
from data.shards.index import index_path, write_atomically
from data.shards.reader import Shards
from data.shards.writer import remove_partial, shard_writer
from data.workers import prepare_worker

HELD = 2**27  # bytes of frames that are encoded at once, unless one clip alone has more; networks take a multiple


Encode = Callable[..., dict[str, Tensor | list[Tensor]]]


@dataclass(frozen=True)
class Encoding:
    """What one stage's frozen parts make of clips: the folder of its shards, their fingerprint, and how.

    `encode(batch, *only)` makes of a batch of a `ClipDataset` all or some of its `PARTS`: {"features": (B, …),
    "text": B × (L, dim), …}.
    """

    folder: Path
    fingerprint: dict
    encode: Encode

    def prepare(self) -> None:
        """The folder with its fingerprint; UserError where it holds shards of another one."""
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


def precompute_shards(
    clips: Dataset,
    encodings: list[Encoding],
    collate: Callable,
    batch_size: int,
    workers: int,
    max_bad_share: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Writes, for each shard in this rank's share of a `ClipDataset` of videos, the encoded ones that are missing.

    The clips are decoded once, for all encodings. UserError where more than `max_bad_share` of them are rejected.
    """
    for encoding in encodings:
        encoding.prepare()
    sizes, tally = clips.shards.sizes, RejectionCount()
    ends, share = list(accumulate(sizes)), share_of(sizes, rank, world_size)
    missing = [encoding.missing(clips.shards, share) for encoding in encodings]
    todo = [shard for shard in share if any(shard in paths for paths in missing)]
    total = sum(sizes[shard] for shard in todo)
    folders = ", ".join(str(encoding.folder) for encoding in encodings)
    batch_size = clips_at_once(clips.clip, batch_size)
    with tqdm(total=total, desc=f"encoding into {folders}", unit="clip", disable=rank != 0 or not total) as progress:
        for shard in todo:
            part = Subset(Sifted(clips), range(ends[shard] - sizes[shard], ends[shard]))
            worker_options = {"num_workers": workers, "worker_init_fn": prepare_worker}
            loader = DataLoader(part, batch_size, collate_fn=partial(_sift, collate), **worker_options)
            wanted = [(e, paths[shard]) for e, paths in zip(encodings, missing, strict=True) if shard in paths]
            for _, path in wanted:
                remove_partial(path)
            _write(_good(loader, progress, tally, max_bad_share), wanted)


def _write(batches: Iterable[dict], wanted: list[tuple[Encoding, Path]]) -> None:
    """One shard of each encoding, all of them while the batches pass."""
    with ExitStack() as stack:
        writers = [(encoding, stack.enter_context(shard_writer(path))) for encoding, path in wanted]
        for batch in batches:
            for encoding, write in writers:
                for sample in encoding.samples(batch):
                    write(sample)


def clips_at_once(clip: Clip, batch_size: int) -> int:
    """What a training batch is of features may be too much of long videos' frames."""
    return max(1, min(batch_size, HELD // (3 * clip.num_frames * clip.height * clip.width)))


def share_of(clips: list[int], rank: int, world_size: int) -> list[int]:
    """The shards of a rank, given how many clips each shard has: all ranks get about as many clips.

    It depends on nothing that changes while they are written, so that ranks agree without a word, whenever each begins.
    """
    share, loads = [], [0] * world_size
    for shard in sorted(range(len(clips)), key=lambda shard: -clips[shard]):
        least = loads.index(min(loads))
        loads[least] += clips[shard]
        if least == rank:
            share.append(shard)
    return share


@contextmanager
def all_ranks_finish() -> Iterator[None]:
    """No rank leaves before all have; they may be hours apart, a barrier of their own group gives up after minutes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    patient = distributed.new_group(backend="gloo", timeout=timedelta(weeks=1))
    yield
    distributed.barrier(patient)


class Sifted(Dataset):
    """The clips, with (key, cause) in place of one that is rejected."""

    def __init__(self, clips: Dataset):
        self.clips = clips

    def __getitem__(self, index: int) -> dict | tuple[str, str]:
        try:
            return self.clips[index]
        except Rejected as cause:
            return self.clips.shards.samples[index][1], str(cause)


def _sift(collate: Callable, samples: list[dict | tuple[str, str]]) -> tuple[dict | None, list[tuple[str, str]]]:
    good = [sample for sample in samples if isinstance(sample, dict)]
    return collate(good) if good else None, [sample for sample in samples if isinstance(sample, tuple)]


def _good(loader: DataLoader, progress: tqdm, tally: RejectionCount, max_bad_share: float) -> Iterator[dict]:
    """The batches of clips that are not rejected."""
    for batch, rejected in loader:
        tally.add(0 if batch is None else len(batch["info"]), rejected)
        tally.check(max_bad_share)
        for key, cause in rejected:
            warnings.warn(f"Sample {key} is left out of the encoded shards: {cause}.", stacklevel=2)
        if batch is not None:
            yield batch
        progress.update(len(rejected) + (0 if batch is None else len(batch["info"])))
