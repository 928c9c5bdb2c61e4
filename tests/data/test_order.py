"""The order is a permutation, a pure function of seed and epoch, and ranks share it out without loss."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Batches, epoch_order

sizes = st.integers(1, 300)
seeds = st.integers(-(2**63), 2**64)


@settings(max_examples=60, deadline=None)
@given(n=sizes, epoch=st.integers(0, 1000), seed=seeds)
def test_each_epoch_is_a_permutation_and_pure(n, epoch, seed):
    order = epoch_order(n, epoch, seed)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, epoch_order(n, epoch, seed))


def test_epochs_and_seeds_differ_and_look_random():
    orders = [tuple(epoch_order(500, epoch, seed).tolist()) for epoch in range(5) for seed in range(5)]
    assert len(set(orders)) == 25
    assert epoch_order(500, 1, 0).tolist() != epoch_order(500, 0, 1).tolist()
    first = np.array([epoch_order(10, epoch, 7)[0] for epoch in range(5000)])
    counts = np.bincount(first, minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-square with 9 degrees of freedom: 27.9 at 0.1 %
    correlation = np.corrcoef(np.arange(5000), epoch_order(5000, 0, 0))[0, 1]
    assert abs(correlation) < 0.06


def test_the_same_in_another_process_and_forever():
    """A resumed run in a fresh process sees these very rows; a change here breaks every run that is under way."""
    assert epoch_order(8, 0, 0).tolist() == FOREVER
    code = "from data.order import epoch_order; print(epoch_order(8, 0, 0).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(FOREVER)


FOREVER = [1, 3, 6, 5, 0, 7, 4, 2]


@settings(max_examples=80, deadline=None)
@given(n=sizes, batch=st.integers(1, 9), world=st.integers(1, 5), seed=seeds, epoch=st.integers(0, 9), data=st.data())
def test_ranks_partition_the_epoch(n, batch, world, seed, epoch, data):
    ranks = [list(Batches(n, batch, seed, epoch, rank, world)) for rank in range(world)]
    assert len({len(r) for r in ranks}) == 1
    assert all(len(rows) == batch for r in ranks for rows in r)
    joined = [row for step in zip(*ranks, strict=True) for rows in step for row in rows]
    order = epoch_order(n, epoch, seed).tolist()
    assert joined[:n] == order
    sampler = Batches(n, batch, seed, epoch, 0, world)
    assert len(joined) == n + sampler.repeated
    assert joined[n:] == [order[k % n] for k in range(n, len(joined))]
    assert len(sampler) == len(ranks[0])
    start = data.draw(st.integers(0, len(sampler) + 1))
    resumed = Batches(n, batch, seed, epoch, 0, world, start=start)
    assert list(resumed) == ranks[0][start:]
    assert len(resumed) == len(ranks[0][start:])


def test_two_ranks_of_one_see_the_batches_of_one_rank_of_two():
    one = list(Batches(11, 2, seed=3, epoch=1))
    two = [list(Batches(11, 1, seed=3, epoch=1, rank=r, world=2)) for r in (0, 1)]
    assert one == [a + b for a, b in zip(*two, strict=True)]


def test_set_epoch_and_unshuffled():
    batches = Batches(6, 2, shuffle=False)
    assert list(batches) == [[0, 1], [2, 3], [4, 5]]
    moving = Batches(6, 2, seed=5)
    moving.set_epoch(3, start=1)
    assert list(moving) == list(Batches(6, 2, seed=5, epoch=3))[1:]
    assert len(moving) == 2
    for wrong in ({"n": 0}, {"batch_size": 0}, {"rank": 2, "world": 2}, {"start": -1}):
        with pytest.raises(ValueError, match="no batches"):
            Batches(**{"n": 4, "batch_size": 2, **wrong})
