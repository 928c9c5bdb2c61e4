"""The order of rows: a pure function of seed, epoch and position, for any number of workers, ranks and resumes.

A row's place in an epoch is the rank of a 64-bit hash of (seed, epoch, row). The hash is splitmix64, a bijection, so
there are no ties, and it does not change with the version of any library.

Cost: one sort of n integers an epoch (0.1 s
for a million rows).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15  # splitmix64's increment (Steele, Lea, Flood 2014)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64, a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashes(n: int, *keys: int) -> np.ndarray:
    """n distinct pseudo-random uint64, a pure function of the keys."""
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = _mix((state ^ np.uint64(key & _MASK)) + np.uint64(_STEP))
    return _mix(state + np.arange(n, dtype=np.uint64) * np.uint64(_STEP))


def epoch_order(n: int, epoch: int, seed: int) -> np.ndarray:
    """The rows 0..n-1 in the order of one epoch, int64 (n,)."""
    return np.argsort(hashes(n, seed, epoch), kind="stable")


class Batches:
    """A batch sampler: the batches of one rank in one epoch, as lists of rows.

    Step s of all ranks together takes positions [s*G, (s+1)*G) of the epoch's order, G = batch_size * world, rank r the
    r-th slice of it: two ranks of batch 1 see the rows of one rank of batch 2. The last step is filled up from the
    order's beginning (`repeated` rows), so that all ranks always run full batches and the same number of them. `start`
    steps are skipped without being drawn. `shuffle=False` keeps the rows' own order.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        shuffle: bool = True,
    ) -> None:
        if n < 1 or batch_size < 1 or not 0 <= rank < world or start < 0:
            raise ValueError(f"no batches: n={n}, batch_size={batch_size}, rank={rank} of {world}, start={start}")
        self.n, self.batch_size, self.seed, self.rank, self.world, self.shuffle = (
            n,
            batch_size,
            seed,
            rank,
            world,
            shuffle,
        )
        self.set_epoch(epoch, start)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    @property
    def steps(self) -> int:
        """Steps of a whole epoch."""
        return -(-self.n // (self.batch_size * self.world))

    @property
    def repeated(self) -> int:
        """Rows of the last step, over all ranks, that fill it up and were seen before."""
        return self.steps * self.batch_size * self.world - self.n

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.n, self.epoch, self.seed) if self.shuffle else np.arange(self.n)
        for step in range(self.start, self.steps):
            first = (step * self.world + self.rank) * self.batch_size
            yield order[np.arange(first, first + self.batch_size) % self.n].tolist()
