"""Which rows a step sees: a function of (seed, position) alone, so that workers, ranks and a resumed run agree.

    epoch 0: a permutation of 0 .. n-1 | epoch 1: another one, of n .. 2n-1 | ...        one endless line of rows
    step s takes the rows  [s*W, (s+1)*W)  of it,  W = batch * accumulation * ranks
    within a step: micro batch a of rank r takes the rows  (a*ranks + r) * batch + [0, batch)

A step may straddle two epochs; no row is dropped, none is repeated but at the very end of the last epoch, which is
filled up to a whole step. One rank with batch 2 and two ranks with batch 1 see the same rows in the same step.

With `group_by_length` the line is rearranged within blocks of 64 steps: rows of a block are sorted by their estimated
length and cut into groups of batch * ranks rows, whose order is drawn again. So the micro batches of all ranks at one
moment hold rows of like length, what is long is seen at any time of the run, and only one block's rows are read ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from data.order import epoch_order, hashes
from mokamm.config_sections import TrainingConfig

BLOCK = 64  # steps among whose rows those of like length are put together


@dataclass(frozen=True)
class Plan:
    """The shape of a run: how many rows a step takes and how many steps there are."""

    rows: int  # of the training set
    batch: int
    accumulation: int
    world: int
    total_steps: int

    @property
    def rows_per_step(self) -> int:
        return self.batch * self.accumulation * self.world

    def epoch(self, step: int) -> float:
        """Epochs finished after `step` steps."""
        return step * self.rows_per_step / self.rows

    def ends_epoch(self, step: int) -> bool:
        """Whether the step numbered `step` (from 1) completes an epoch, or the run."""
        return int(self.epoch(step)) > int(self.epoch(step - 1)) or step == self.total_steps


def plan(rows: int, batch: int, accumulation: int, world: int, epochs: float, max_steps: int) -> Plan:
    """max_steps > 0 overrides epochs."""
    per_step = batch * accumulation * world
    steps = max_steps if max_steps > 0 else math.ceil(rows * epochs / per_step)
    return Plan(rows, batch, accumulation, world, max(1, steps))


def plan_of(training: TrainingConfig, rows: int, world: int) -> Plan:
    """The plan of a run with so many training rows and ranks."""
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    return plan(rows, batch, accumulation, world, training.num_train_epochs, training.max_steps)


class MicroBatches:
    """A batch sampler: the row numbers of every micro batch of one rank, from a step on.

    length: the estimated length of a row, to put rows of like length together; None leaves the order as it is drawn.
    """

    def __init__(
        self, plan: Plan, seed: int, rank: int, first_step: int = 0, length: Callable[[int], int] | None = None
    ) -> None:
        self.plan, self.seed, self.rank, self.first_step, self.length = plan, seed, rank, first_step, length
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(plan.rows, epoch, seed))
        self._block = lru_cache(maxsize=1)(self._grouped)

    def __len__(self) -> int:
        return (self.plan.total_steps - self.first_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        p = self.plan
        for step in range(self.first_step, p.total_steps):
            block, within = divmod(step, BLOCK)
            rows = self._block(block)[within * p.rows_per_step : (within + 1) * p.rows_per_step]
            for micro in range(p.accumulation):
                first = (micro * p.world + self.rank) * p.batch
                yield rows[first : first + p.batch]

    def _grouped(self, block: int) -> list[int]:
        """The rows of a block of steps, in the order in which they are taken."""
        p = self.plan
        steps = range(block * BLOCK, min((block + 1) * BLOCK, p.total_steps))
        rows = [self._row(position) for position in range(steps.start * p.rows_per_step, steps.stop * p.rows_per_step)]
        if self.length is None:
            return rows
        rows.sort(key=self.length)  # stable: rows of one length stay in the order that was drawn
        size = p.batch * p.world
        order = hashes(len(rows) // size, self.seed, block, len(rows)).argsort(kind="stable").tolist()
        return [row for group in order for row in rows[group * size : (group + 1) * size]]

    def _row(self, position: int) -> int:
        """The row at a position of the endless line; epoch e's are numbered from e * plan.rows (data/dataset.py)."""
        epoch, offset = divmod(position, self.plan.rows)
        return epoch * self.plan.rows + int(self._order(epoch)[offset])


class ValidationBatches:
    """A batch sampler over rows 0 .. n-1, the same number of batches on every rank.

    ZeRO-3 needs every rank in every forward; where the rows run out, row 0 stands in, and `real(i)` says how many rows
    of the i-th batch count.
    """

    def __init__(self, rows: int, batch: int, rank: int, world: int) -> None:
        self.rows, self.batch, self.rank, self.world = rows, batch, rank, world

    def __len__(self) -> int:
        return math.ceil(self.rows / (self.batch * self.world))

    def _span(self, i: int) -> range:
        first = (i * self.world + self.rank) * self.batch
        return range(min(first, self.rows), min(first + self.batch, self.rows))

    def real(self, i: int) -> int:
        return len(self._span(i))

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(len(self)):
            yield list(self._span(i)) or [0]
