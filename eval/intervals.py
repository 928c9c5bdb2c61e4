"""95 % intervals by bootstrap over independent units.

Questions about one clip stand or fall together, so clips are drawn anew, not questions (Efron and Tibshirani 1993,
chapter 13: the percentile interval). A score may be a sum of ratios over groups of rows (MME's subtasks): units are
then drawn within the groups that they belong to, so that no group changes its size. The seed is fixed: the same
predictions give the same interval. Cost: DRAWS x (units + groups), in blocks of draws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
TAIL = (1 - 0.95) / 2  # outside of the interval on each side
BLOCK = 50  # draws held in memory at once

Array = NDArray[np.float64]


def bootstrap_interval(
    earned: Sequence[tuple[float, float]],
    units: Sequence[str],
    groups: Sequence[str] | None = None,
) -> list[float] | None:
    """The interval of sum over groups of (sum of points / sum of `of`), rows taken together by unit.

    None where there are fewer than two units. groups: of each row; default: all rows are one group.
    """
    if len(set(units)) < 2:
        return None
    generator = np.random.default_rng(0)
    strata = _strata(earned, units, groups or [""] * len(units))
    points, of = defaultdict[str, Array](lambda: np.zeros(DRAWS)), defaultdict[str, Array](lambda: np.zeros(DRAWS))
    for names, table in strata.items():
        drawn = _draw(table, generator)
        for column, name in enumerate(names):
            points[name] += drawn[:, 2 * column]
            of[name] += drawn[:, 2 * column + 1]
    ratios = [np.divide(points[g], of[g], out=np.zeros(DRAWS), where=of[g] > 0) for g in points]
    low, high = np.quantile(np.sum(ratios, axis=0), [TAIL, 1 - TAIL])
    return [float(low), float(high)]


def _strata(
    earned: Sequence[tuple[float, float]], units: Sequence[str], groups: Sequence[str]
) -> dict[tuple[str, ...], Array]:
    """Units that earn in the same groups -> a table (units, 2 * groups) of points and `of`."""
    by_unit: dict[str, dict[str, list[float]]] = {}
    for (points, of), unit, group in zip(earned, units, groups, strict=True):
        cell = by_unit.setdefault(unit, {}).setdefault(group, [0.0, 0.0])
        cell[0] += points
        cell[1] += of
    strata: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    for _, cells in sorted(by_unit.items()):
        names = tuple(sorted(cells))
        strata[names].append([number for name in names for number in cells[name]])
    return {names: np.asarray(rows) for names, rows in strata.items()}


def _draw(table: Array, generator: np.random.Generator) -> Array:
    """Sums of the table's columns over as many units drawn with replacement, (DRAWS, columns)."""
    units = len(table)
    equal = np.full(units, 1 / units)
    sums = [
        generator.multinomial(units, equal, size=min(BLOCK, DRAWS - start)) @ table for start in range(0, DRAWS, BLOCK)
    ]
    return np.concatenate(sums)
