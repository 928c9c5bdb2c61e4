"""95 % intervals by bootstrap over independent units.

Questions about one clip stand or fall together, so clips are drawn anew, not questions (Efron and Tibshirani 1993,
chapter 13: the percentile interval). The seed is fixed: the same predictions give the same interval. Cost: DRAWS x
units, in blocks of draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 1000
BLOCK = 50  # draws held in memory at once


def bootstrap_interval(
    earned: Sequence[tuple[float, float]], units: Sequence[str], level: float = 0.95, seed: int = 0
) -> list[float] | None:
    """The interval of sum(points) / sum(of) over rows grouped by unit; None where there are fewer than two units."""
    names, group = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2:
        return None
    table = np.asarray(earned, dtype=np.float64)
    points, of = (np.bincount(group, weights=table[:, column], minlength=len(names)) for column in (0, 1))
    generator = np.random.default_rng(seed)
    equal = np.full(len(names), 1 / len(names))
    scores = []
    for start in range(0, DRAWS, BLOCK):
        counts = generator.multinomial(len(names), equal, size=min(BLOCK, DRAWS - start))
        whole = counts @ of
        scores.append(np.divide(counts @ points, whole, out=np.zeros_like(whole), where=whole > 0))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(scores), [tail, 1 - tail])
    return [float(low), float(high)]
