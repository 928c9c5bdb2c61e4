"""How sure one may be of a score and of a difference between two methods.

A method's score is the mean over its seeds of points earned / points to be earned. It varies for two reasons: another
set of clips would have been drawn, and another seed would have been trained. Both belong into an interval that speaks
of the *method*, so the variances of the two are added:

    V = V_clips + V_seeds
    V_clips = variance over clips of the seeds' mean residual / clips     residual: points - score * points to be earned
    V_seeds = variance over seeds of the score / seeds                    (per clip, in units of the mean clip)
    interval = score -+ t(df) sqrt(V),  df = V^2 / (V_clips^2 / (clips - 1) + V_seeds^2 / (seeds - 1))

the degrees of freedom being Satterthwaite's (1946). What varies with clip and seed together is in both terms, so that
V is too large rather than too small: at most twice the true variance, where nothing else varies. With one seed V_seeds
is not known: the interval then speaks of that one trained model only. For a difference the clips are paired (both methods
saw the same) and the seeds are not.

Two tests of a difference, both against "no difference":
    sign flips   each clip's difference (seeds averaged) keeps or changes its sign by a coin (Fisher 1935): exact, for the
                 trained models at hand; knows nothing of seeds
    t            the difference over sqrt(V), as above: for the methods
Holm's (1979) correction keeps the chance of any false alarm among all tests of a family at the level.

Axis letters: S seeds, U units (clips). Cost: DRAWS x clips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95  # of intervals
DRAWS = 20_000
EXACT = 16  # up to so many clips that differ, all sign flips are tried
BLOCK = 500  # draws held in memory at once


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval. p: of the t test against 0; None with one unit."""

    mean: float
    interval: list[float] | None
    p: float | None
    with_seeds: bool  # whether the interval knows of the seeds


def score(points_SU: Array, of_U: Array) -> Estimate:
    """The mean score over seeds. points_SU: earned by each seed at each clip; of_U: what could be earned there."""
    return _estimate([(points_SU, 1.0)], of_U)


def difference(points_SU: Array, other_SU: Array, of_U: Array) -> Estimate:
    """The mean score minus that of another method on the same clips; the numbers of seeds may differ."""
    return _estimate([(points_SU, 1.0), (other_SU, -1.0)], of_U)


def _estimate(terms: list[tuple[Array, float]], of_U: Array) -> Estimate:
    units, total = len(of_U), float(of_U.sum())
    scores = [points.sum(1) / total for points, _ in terms]
    mean = float(sum(sign * values.mean() for (_, sign), values in zip(terms, scores, strict=True)))
    if units < 2:
        return Estimate(mean, None, None, False)
    earned_U = np.sum([sign * points.mean(0) for points, sign in terms], axis=0)
    residual_U = (earned_U - mean * of_U) / (total / units)
    parts = [(float(residual_U.var(ddof=1)) / units, units - 1)]
    with_seeds = all(len(values) > 1 for values in scores)
    if with_seeds:
        parts += [(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in scores]
    variance = sum(part for part, _ in parts)
    if variance <= 0.0:
        p = 2.0 ** (1 - units) if mean else 1.0  # nothing varies: t would be infinite, this is what sign flips say
        return Estimate(mean, [mean, mean], p, with_seeds)
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    half = t_quantile(0.5 + LEVEL / 2, freedom) * math.sqrt(variance)
    return Estimate(mean, [mean - half, mean + half], t_two_sided(mean / math.sqrt(variance), freedom), with_seeds)


# ---- Student's t -----------------------------------------------------------------------------------------------------


def _t_distribution(freedom: float) -> tuple[Array, Array]:
    """(angles a, P(0 < T < sqrt(df) tan(a))): over a the density of T = sqrt(df) tan(a) is cos(a)^(df - 1), up to scale."""
    angle = np.linspace(0.0, math.pi / 2, 100_001)
    middle = (angle[1:] + angle[:-1]) / 2
    area = np.concatenate([[0.0], np.cumsum(np.cos(middle) ** (freedom - 1))])
    return angle, area / area[-1] / 2


def t_quantile(probability: float, freedom: float) -> float:
    """The t below which a share `probability` (0.5 to 1) of Student's distribution lies; freedom: 1 or more."""
    angle, area = _t_distribution(freedom)
    return math.tan(float(np.interp(probability - 0.5, area, angle))) * math.sqrt(freedom)


def t_two_sided(t: float, freedom: float) -> float:
    """The chance of a |T| of at least |t|."""
    angle, area = _t_distribution(freedom)
    return max(0.0, 1 - 2 * float(np.interp(math.atan(abs(t) / math.sqrt(freedom)), angle, area)))


# ---- tests -----------------------------------------------------------------------------------------------------------


def sign_flips(differences_U: Array) -> float:
    """Two-sided p of the sum of paired differences under random signs.

    Exact for up to EXACT differences that are not zero, else from DRAWS random sign patterns, the observed one counted
    among them (Phipson and Smyth 2010), so that p is never 0.
    """
    found = np.asarray(differences_U, dtype=np.float64)
    found = found[found != 0]
    if not len(found):
        return 1.0
    observed = abs(found.sum())
    bound = observed * (1 - 1e-12) - 1e-12  # sums that differ by rounding only are equal
    if len(found) <= EXACT:
        patterns = np.arange(2 ** len(found))[:, None] >> np.arange(len(found)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ found) >= bound))
    generator, reached = np.random.default_rng(0), 0
    for _ in range(DRAWS // BLOCK):
        signs = 1 - 2 * generator.integers(0, 2, size=(BLOCK, len(found)))
        reached += int(np.sum(np.abs(signs @ found) >= bound))
    return (reached + 1) / (DRAWS + 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: the k-th smallest of n times n - k + 1, never falling, at most 1; None stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[i] = highest
    return corrected
