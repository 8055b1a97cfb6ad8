"""The pass that writes encoded shards: the frozen parts over all clips, on all ranks."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

from lightning import LightningDataModule
from torch import distributed
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data.batch import collate
from data.clip import Clip
from data.encoded.cuts import Stretches
from data.encoded.encoding import Encoding
from data.interface import ClipModel
from data.rejected import Rejected, RejectionCount
from data.shards.writer import remove_unfinished, shard_writer
from data.workers import prepare_worker
from lightning_semgen.errors import UserError

HELD = 2**27  # bytes of frames that are encoded at once, unless one clip alone has more; networks take a multiple


@contextmanager
def all_ranks_finish() -> Iterator[None]:
    """No rank leaves before all are done. Ranks may be hours apart; the barrier of the default group waits minutes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    patient = distributed.new_group(backend="gloo", timeout=timedelta(weeks=1))
    yield
    distributed.barrier(patient)


@all_ranks_finish()
def precompute(pairs: Sequence[tuple[LightningDataModule, ClipModel]], rank: int = 0, world_size: int = 1) -> None:
    """Runs the models' frozen parts over all clips that are not encoded yet, each rank over its share of the shards.

    Each model comes with its `VideoDataModule`. All see the clips in one pass; the first data module reads them.
    UserError if the clips are not the same.
    """
    data, _ = pairs[0]
    for other, model in pairs:
        check_same_clips(data, other)
        model.load_compressor()
    for split in data.shards:
        clips, batch_size = data.clips(split, encoded=False), min(other.batch_size for other, _ in pairs)
        clips.needs_video = any(model.needs_video for _, model in pairs)
        at_once = clips_at_once(data.clip, batch_size)
        encodings = [other.encoded_options.encoding(split, model, at_once) for other, model in pairs]
        if (seconds := data.encoded_options.seconds[split]) is not None:
            clips, batch_size = Stretches(clips, seconds), 1
        precompute_shards(clips, encodings, batch_size, data.num_workers, data.max_bad_share, rank, world_size)


def check_same_clips(data: LightningDataModule, other: LightningDataModule) -> None:
    for name, value in other.clip_options.items():
        if value != (mine := data.clip_options[name]):
            raise UserError(
                f"One pass encodes one set of clips, but data.{name} is {mine} in one config and {value} in"
                " another: give it once for all on the command line, or encode them one after another."
            )


def precompute_shards(
    clips: Dataset,
    encodings: list[Encoding],
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
    sizes, rejections = clips.shards.sizes, RejectionCount()
    ends, share = list(accumulate(sizes)), share_of(sizes, rank, world_size)
    missing = [encoding.missing(clips.shards, share) for encoding in encodings]
    todo = [shard for shard in share if any(shard in paths for paths in missing)]
    total = sum(sizes[shard] for shard in todo)
    folders = ", ".join(str(encoding.folder) for encoding in encodings)
    batch_size = clips_at_once(clips.clip, batch_size)
    with tqdm(total=total, desc=f"encoding into {folders}", unit="clip", disable=rank != 0 or not total) as progress:
        for shard in todo:
            part = Subset(ClipsOrCauses(clips), range(ends[shard] - sizes[shard], ends[shard]))
            worker_options = {"num_workers": workers, "worker_init_fn": prepare_worker}
            loader = DataLoader(part, batch_size, collate_fn=_collate_usable, **worker_options)
            wanted = [(e, paths[shard]) for e, paths in zip(encodings, missing, strict=True) if shard in paths]
            for _, path in wanted:
                remove_unfinished(path)
            _write(_usable_batches(loader, progress, rejections, max_bad_share), wanted)


def _write(batches: Iterable[dict], wanted: list[tuple[Encoding, Path]]) -> None:
    """Writes one shard of each encoding, in one pass over the batches."""
    with ExitStack() as stack:
        writers = [(encoding, stack.enter_context(shard_writer(path))) for encoding, path in wanted]
        for batch in batches:
            for encoding, write in writers:
                for sample in encoding.samples(batch):
                    write(sample)


def clips_at_once(clip: Clip, batch_size: int) -> int:
    """Clips that are encoded at once: a training batch, or fewer if their frames take more than `HELD` bytes."""
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


class ClipsOrCauses(Dataset):
    """The clips; in place of a rejected one, (key, cause)."""

    def __init__(self, clips: Dataset):
        self.clips = clips

    def __getitem__(self, index: int) -> dict | tuple[str, str]:
        try:
            return self.clips[index]
        except Rejected as cause:
            return self.clips.shards.samples[index][1], str(cause)


def _collate_usable(samples: list[dict | tuple[str, str]]) -> tuple[dict | None, list[tuple[str, str]]]:
    good = [sample for sample in samples if isinstance(sample, dict)]
    return collate(good) if good else None, [sample for sample in samples if isinstance(sample, tuple)]


def _usable_batches(
    loader: DataLoader, progress: tqdm, rejections: RejectionCount, max_bad_share: float
) -> Iterator[dict]:
    """The batches of clips that are not rejected."""
    for batch, rejected in loader:
        rejections.add(0 if batch is None else len(batch["info"]), rejected)
        rejections.check(max_bad_share)
        for key, cause in rejected:
            warnings.warn(f"Sample {key} is left out of the encoded shards: {cause}.", stacklevel=2)
        if batch is not None:
            yield batch
        progress.update(len(rejected) + (0 if batch is None else len(batch["info"])))
