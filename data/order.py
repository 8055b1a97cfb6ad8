"""The order of samples: a pure function of (seed, epoch, position), a permutation without replacement."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def sample_at(position: int, seed: int, count: int) -> int:
    """The sample delivered at a position of the endless stream; an epoch is `count` positions."""
    epoch, place = divmod(position, count)
    return int(_permutation(seed, epoch, count)[place])


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
