"""Buckets of shapes: each video at the one that fits it best, each batch, on all ranks together, of one."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import ConcatDataset, Dataset

from data.clip import Clip
from data.codec.decode import TOLERANCE
from data.datasets import ClipDataset, Stream, caption_of, video_of
from data.pack.probe import probe
from data.random_numbers import sample_key
from data.rejected import Rejected
from data.shards.reader import Shards
from data.shards.records import measured_by_pack
from lightning_semgen.errors import UserError

EQUAL = 1e-6  # difference in waste that is rounding


def clips_of(shapes: Sequence[Sequence[int]], nominal: Clip) -> list[Clip]:
    """Clips of shapes (height, width, num_frames), the longest and then the largest first; UserError for no shape."""
    clips = []
    for shape in shapes:
        if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
            raise UserError(f"data.buckets holds {shape}: give each bucket as [height, width, num_frames].")
        clips.append(replace(nominal, height=shape[0], width=shape[1], num_frames=shape[2]))
    return sorted(clips, key=lambda clip: (clip.num_frames, clip.height * clip.width), reverse=True)


def fitting(buckets: list[Clip], seconds: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """For each video the bucket that wastes least of it (the first of equal ones); -1 if it is too short for all.

    Waste is the area of the scaled picture, divided by the area that the crop keeps, times the enlargement.
    """
    best, least = np.full(len(seconds), -1), np.full(len(seconds), np.inf)
    for number, clip in enumerate(buckets):
        scale = np.maximum(clip.height / height, clip.width / width)
        waste = scale**2 * height * width / (clip.height * clip.width) * np.maximum(scale, 1)
        better = (seconds > clip.duration + TOLERANCE) & (waste < least - EQUAL)
        best[better], least[better] = number, waste[better]
    return best


def split_into(buckets: list[Clip], clips: ClipDataset) -> list[ClipDataset]:
    """The clips of each bucket that has any; UserError if none has, or if a shard does not know its videos' size."""
    rows, unusable = _measured(clips.shards)
    best = fitting(buckets, *rows.T)
    good = np.delete(best, unusable)
    best[unusable] = np.bincount(good[good >= 0], minlength=1).argmax()  # rejected there, and counted
    members = [np.flatnonzero(best == number).tolist() for number in range(len(buckets))]
    counts = [f"{len(m)} of {b.num_frames}×{b.height}×{b.width}" for b, m in zip(buckets, members, strict=True)]
    rank_zero_info(f"train: {', '.join(counts)}; {np.sum(best < 0)} too short for all of data.buckets are left out.")
    if not any(members):
        raise UserError(
            f"None of the {len(clips)} videos in {clips.shards.paths[0].parent} is long enough for any of data.buckets:"
            " add one of fewer frames."
        )
    return [
        ClipDataset(clips.shards.only(indices), clip, clips.needs_video, clips.selection)
        for clip, indices in zip(buckets, members, strict=True)
        if indices
    ]


def _measured(shards: Shards) -> tuple[np.ndarray, list[int]]:
    """(N, 3): seconds, height and width of each video; and the places of those that are rejected, which have 1 there.

    UserError for a shard that says nothing of its videos; in one that does, a video of which it does not is looked at.
    """
    rows, unusable = np.ones((len(shards), 3)), []
    told = {number for (number, *_), row in zip(shards.samples, shards.measured, strict=True) if None not in row}
    for index, row in enumerate(shards.measured):
        number = shards.samples[index][0]
        if index not in shards.problems and number not in told:
            raise UserError(
                f"The index of {shards.paths[number]} does not say how long, high and wide its videos are, by which"
                " data.buckets sorts them: write it anew by `lightning pack`, or set data.buckets to null."
            )
        try:
            rows[index] = _looked_at(shards, index) if None in row else row
        except Rejected:
            unusable.append(index)
    return rows, unusable


def _looked_at(shards: Shards, index: int) -> tuple[float, int, int]:
    """Seconds, height and width of a video; of one that is broken what it had when it was packed, or `Rejected`."""
    members = shards.read(index)
    try:
        facts = probe(video_of(members))
    except Rejected:  # it will be again, in that bucket, and counted
        info = caption_of(members)["info"]
        if not (facts := measured_by_pack(info, info.get("size"))):
            raise
    return facts["duration"], facts["height"], facts["width"]


class BlockOrder:
    """The bucket of each batch, and the batch's place in the endless order of that bucket: a pure function.

    A block is a batch of all ranks, so that they all have the same shape. Each bucket's order is cut into blocks of
    `size`; a block may span two passes over the bucket. By the end of epoch e, ⌈e · count / size⌉ blocks of each bucket
    have begun. The blocks that an epoch adds come in random order.

    Args:
        counts: samples of each bucket.
        seed: of that order.
        size: samples of a block.
    """

    def __init__(self, counts: Sequence[int], seed: int, size: int):
        self.counts, self.seed, self.size = np.asarray(counts), seed, size
        self._epoch: tuple[int, np.ndarray] | None = None

    def __call__(self, position: int) -> tuple[int, int]:
        """The bucket, and the place in its order, of a position in the stream of all."""
        block, offset = divmod(position, self.size)
        epochs = range(block * self.size // int(self.counts.sum()) + 1)
        epoch = bisect_right(epochs, block, key=lambda epoch: self._begun(epoch).sum()) - 1
        begun = self._begun(epoch)
        dealt = self._dealt(epoch)[: block - begun.sum() + 1]
        bucket = dealt[-1]
        number = begun[bucket] + np.count_nonzero(dealt == bucket) - 1
        return int(bucket), int(number) * self.size + offset

    def _begun(self, epoch: int) -> np.ndarray:
        """Blocks of each bucket before an epoch."""
        return -(-epoch * self.counts // self.size)

    def _dealt(self, epoch: int) -> np.ndarray:
        """The bucket of each block of an epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            added = self._begun(epoch + 1) - self._begun(epoch)
            blocks = np.repeat(np.arange(len(self.counts)), added)
            shuffled = np.random.default_rng(sample_key(self.seed, epoch, "buckets")).permutation(blocks)
            self._epoch = epoch, shuffled
        return self._epoch[1]


class BucketStream(Dataset):
    """The endless stream of training samples of several buckets: `Stream`, with the `shape` of each sample.

    A shape is (num_frames, height, width). A rejected sample is replaced by the next good one of its own bucket.

    Args:
        buckets: the clips of each.
        seed: of each bucket's order, so that all go through the same shards at the same time.
        open_shards: whose samples are mixed with each other.
        batch_size: of all ranks together; positions from a multiple of it to the next are of one bucket.
    """

    def __init__(self, buckets: list[ClipDataset], seed: int, open_shards: int, batch_size: int):
        self.clips = ConcatDataset(buckets)
        self.streams = [Stream(clips, seed, open_shards) for clips in buckets]
        self.order = BlockOrder([len(clips) for clips in buckets], seed, batch_size)

    def __getitem__(self, position: int) -> dict:
        bucket, place = self.order(position)
        stream = self.streams[bucket]
        clip = stream.clips.clip
        return stream.sample(place, position) | {"shape": (clip.num_frames, clip.height, clip.width)}
