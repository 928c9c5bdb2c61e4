"""Intervals, tests and corrections of eval/comparison/differences.py, against tables, enumeration and simulation."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.comparison.differences import EXACT, difference, holm, score, sign_flips, t_quantile, t_two_sided
from eval.comparison.results import Points

# Student's t, two-sided 95 % (probability .975), from printed tables
TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 10: 2.2281, 29: 2.0452, 120: 1.9799, 100_000: 1.96}


@pytest.mark.parametrize("freedom", TABLE)
def test_t_quantiles_are_those_of_the_tables(freedom: int) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(TABLE[freedom], abs=1e-4)
    assert t_two_sided(TABLE[freedom], freedom) == pytest.approx(0.05, abs=1e-5)


def test_t_with_one_degree_of_freedom_is_cauchys() -> None:
    for t in (0.1, 1.0, 7.0):
        assert t_two_sided(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-7)
        assert t_two_sided(-t, 1) == t_two_sided(t, 1)
    assert t_two_sided(0.0, 3.5) == 1.0


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_a_score_and_its_interval_by_hand() -> None:
    """Two seeds, three clips of 2, 1 and 1 questions."""
    points = np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    of = np.array([2.0, 1.0, 1.0])
    found = score(points, of)
    assert found.mean == pytest.approx(0.75)  # (3/4 + 3/4) / 2
    # means over seeds 1.5, 0.5, 1; residuals 1.5 - 1.5, 0.5 - 0.75, 1 - 0.75 over the mean clip 4/3
    residuals = np.array([0.0, -0.25, 0.25]) / (4 / 3)
    clips = (residuals**2).sum() / 2 / 3
    assert found.with_seeds
    half = t_quantile(0.975, 2) * math.sqrt(clips)  # the seeds do not differ: all freedom is the clips'
    assert found.interval == pytest.approx([0.75 - half, 0.75 + half])


def test_seeds_widen_the_interval_by_satterthwaites_formula() -> None:
    points = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = score(points, np.ones(4))
    scores = points.mean(1)
    clips, seeds = points.mean(0).var(ddof=1) / 4, scores.var(ddof=1) / 3
    freedom = (clips + seeds) ** 2 / (clips**2 / 3 + seeds**2 / 2)
    half = t_quantile(0.975, freedom) * math.sqrt(clips + seeds)
    assert found.interval == pytest.approx([scores.mean() - half, scores.mean() + half])
    alone = score(points.mean(0, keepdims=True), np.ones(4))
    assert not alone.with_seeds
    assert alone.interval is not None
    assert found.interval[1] - found.interval[0] > alone.interval[1] - alone.interval[0]


def test_a_difference_is_paired_by_clip_and_not_by_seed() -> None:
    generator = np.random.default_rng(0)
    clip = generator.normal(size=60)
    one, other = (
        clip + 0.1 + generator.normal(scale=0.05, size=(3, 60)),
        clip + generator.normal(scale=0.05, size=(2, 60)),
    )
    found = difference(one, other, np.ones(60))
    assert found.mean == pytest.approx(one.mean() - other.mean())
    apart = score(one, np.ones(60))
    assert found.interval is not None
    assert apart.interval is not None
    width = found.interval[1] - found.interval[0]
    assert width < 0.2 * (apart.interval[1] - apart.interval[0])  # the clips' own level cancels
    assert found.interval[0] > 0
    assert found.p is not None
    assert found.p < 0.001
    assert difference(one, other[::-1], np.ones(60)) == found  # the order of seeds says nothing
    back = difference(other, one, np.ones(60))
    assert (back.mean, back.p) == pytest.approx((-found.mean, found.p))


def test_too_little_to_tell() -> None:
    assert score(np.array([[1.0], [0.0]]), np.ones(1)).interval is None  # one clip
    same = score(np.array([[1.0, 1.0]]), np.ones(2))
    assert same.interval == [1.0, 1.0]
    assert same.p == 0.5  # of two units, as sign flips have it
    equal, seeds = np.array([[1.0, 0.0], [1.0, 0.0]]), np.ones(2)
    assert difference(equal, equal, seeds).p == 1.0
    right = np.ones((2, 8))
    assert (
        difference(right, 0 * right, np.ones(8)).p == sign_flips(np.ones(8)) == 2 / 2**8
    )  # all right against all wrong


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """200 small worlds: effects of clip, seed and both together; 95 % intervals, a little wide by design."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        clip, seed = generator.normal(0, 0.3, size=40), generator.normal(0, 0.05, size=(3, 1))
        points = 0.6 + clip + seed + generator.normal(0, 0.2, size=(3, 40))
        interval = score(points, np.ones(40)).interval
        assert interval is not None
        inside += interval[0] <= 0.6 <= interval[1]
    assert 185 <= inside <= 200


# ---- sign flips ------------------------------------------------------------------------------------------------------


def enumerated(values: list[float]) -> float:
    observed = abs(math.fsum(values))
    sums = [abs(math.fsum(s * v for s, v in zip(signs, values, strict=True))) for signs in _signs(len(values))]
    return sum(total >= observed - 1e-9 for total in sums) / len(sums)


def _signs(n: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, -1), repeat=n))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flips_equal_exact_enumeration(values: list[int]) -> None:
    thirds = [value / 3 for value in values]
    assert sign_flips(np.array(thirds)) == pytest.approx(enumerated(thirds))


def test_sign_flips_known_cases() -> None:
    assert sign_flips(np.ones(5)) == 2 / 2**5
    assert sign_flips(np.zeros(30)) == 1.0
    assert sign_flips(np.concatenate([np.ones(5), np.zeros(40)])) == 2 / 2**5  # clips that are equal say nothing
    assert sign_flips(np.array([1.0, -1.0])) == 1.0


def test_many_clips_are_drawn_and_agree_with_enumeration() -> None:
    values = np.random.default_rng(3).normal(0.25, 1.0, size=EXACT + 2)
    patterns = 1 - 2 * (np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1)
    exact = float(np.mean(np.abs(patterns @ values) >= abs(values.sum()) - 1e-9))
    drawn = sign_flips(values)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert sign_flips(values) == drawn  # the seed is fixed
    assert 0 < sign_flips(np.ones(100)) < 1e-4  # never 0


# ---- Holm ------------------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    # sorted 0.01 * 4 = 0.04, 0.02 * 3 = 0.06, 0.03 * 2 = 0.06, 0.04 * 1 = 0.04 -> not below 0.06
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.2, None, 0.01]) == [pytest.approx(0.2), None, pytest.approx(0.02)]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_step_down_rejects(values: list[float]) -> None:
    """The procedure as Holm states it, at 5 %: go through the sorted p-values and stop at the first that is too large."""
    rejected: set[int] = set()
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        if values[i] * (len(values) - rank) > 0.05:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(values)) if p is not None and p <= 0.05} == rejected


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_an_answer_may_hold_any_end_of_line(tmp_path: Path) -> None:
    """As eval/run.py writes it: not escaped, and str.splitlines would cut there."""
    rows = [
        {"unit": "a", "of": 1, "points": 1, "prediction": "one\u2028two\x85three"},
        {"unit": "b", "of": 2, "points": 0},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert Points().read(path).tolist() == [1.0, 0.0]
