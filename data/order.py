"""The order of samples: a pure function of (seed, epoch, position), a permutation without replacement."""

from collections.abc import Callable, Iterator

import numpy as np


# Why groups of shards: a permutation over all samples would read from all shards at once. Within a group of open shards
# the order is a full permutation, and groups of other shards follow each other. Why a pure function: a resumed run, or
# one on another number of ranks, then needs no state but a position.
class SampleOrder:
    """Permutes shards, and samples within each group of `open_shards`, so that reads stay in few files.

    Args:
        sizes: samples of each shard, which lie one shard after another.
        seed: of both permutations, drawn anew for each epoch.
        open_shards: whose samples are mixed with each other.
    """

    def __init__(self, sizes: list[int], seed: int, open_shards: int):
        self.sizes, self.seed, self.open_shards = np.asarray(sizes), seed, open_shards
        self.firsts = np.cumsum(self.sizes) - self.sizes
        self.count = int(self.sizes.sum())
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._mixed: tuple[tuple[int, int], np.ndarray] | None = None

    def __call__(self, position: int) -> int:
        """The sample at a position of the endless stream; an epoch is `count` positions."""
        epoch, place = divmod(position, self.count)
        shards, ends = self._shards(epoch)
        group = int(np.searchsorted(ends, place, side="right"))
        samples = self._samples(epoch, group, shards)
        return int(samples[place - ends[group] + len(samples)])

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in an epoch's order, and where in it each group of `open_shards` ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes))
            groups = range(0, len(shards), self.open_shards)
            self._epoch = epoch, shards, np.cumsum(np.add.reduceat(self.sizes[shards], groups))
        return self._epoch[1:]

    def _samples(self, epoch: int, group: int, shards: np.ndarray) -> np.ndarray:
        if self._mixed is None or self._mixed[0] != (epoch, group):
            among = shards[group * self.open_shards : (group + 1) * self.open_shards]
            samples = np.concatenate([self.firsts[shard] + np.arange(self.sizes[shard]) for shard in among])
            self._mixed = (epoch, group), np.random.default_rng((self.seed, epoch, group)).permutation(samples)
        return self._mixed[1]


class PositionBatches:
    """Endless batches of stream positions for one rank: the global batch k is [start + kB, start + (k + 1)B).

    `start` is asked for at each iteration: Lightning begins a new one wherever its own epochs end.
    """

    def __init__(self, start: Callable[[], int], batch_size: int, rank: int, world_size: int):
        self.start, self.batch_size, self.rank, self.world_size = start, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start() + self.rank * self.batch_size
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.world_size * self.batch_size
