"""The order of rows: a pure function of seed, epoch and position, for any number of workers, ranks and resumes.

A row's place in an epoch is the rank of a 64-bit hash of (seed, epoch, row). The hash is splitmix64, a bijection, so
there are no ties, and it does not change with the version of any library.

Cost: one sort of n integers an epoch (0.1 s for a million rows).
"""

from __future__ import annotations

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
