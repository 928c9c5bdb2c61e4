"""The rows of all sources as one map-style data set of examples, in which a bad row never stops a run by itself.

    i --epoch, position--> (part, row) --Rows--> Sample --process--> Example
                               ^                        | BadSample
                               '--- substitute(i, k) <--' ledger

Positions 0 .. n-1 are the first epoch, n .. 2n-1 the second, and so on without an end; epochs differ where a weight has
a fraction, which takes other rows in each. The substitute's row is a pure function of (seed, i, k), so the batches are
the same with any number of workers and after a resume.

Cost: an integer a row of sources whose weight has a fraction; samples are read, and media decoded, only when asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol

import torch

from data.ledger import Ledger
from data.order import epoch_order, hashes
from data.schema import BadSample, Example, Sample, UserError

TRIES = 32  # substitutes tried for one row: the first half from its own part, the rest from anywhere

Process = Callable[[Sample], Example]


class SampleRows(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


class Part(NamedTuple):
    """One source in the mixture. weight 2.5: in each epoch every row twice, and half of them a third time, in turns.
    process: for rows with a loader of their own (another media_dir); otherwise the data set's."""

    rows: SampleRows
    weight: float
    name: str
    process: Process | None = None


def epoch_rows(rows: int, weight: float) -> int:
    """How many rows an epoch takes of a source."""
    return rows * int(weight) + round((weight - int(weight)) * rows)


class _Turns:
    """The rows of one part in each epoch, `weight` times as many as it has.

    The fraction's rows are the next ones of a permutation drawn by the seed, which starts again where it ends: so in a
    long run each row comes as often as any other, but for one time.
    """

    def __init__(self, rows: int, weight: float, seed: int, part: int) -> None:
        self.rows, self.whole = rows, rows * int(weight)
        self.fraction = epoch_rows(rows, weight) - self.whole
        self.order = epoch_order(rows, part, seed) if self.fraction else None
        if self.order is not None:
            self.order[: self.fraction].sort()  # the first epoch's, in the order of the file

    def __len__(self) -> int:
        return self.whole + self.fraction

    def row(self, epoch: int, k: int) -> int:
        """The k-th row of an epoch."""
        if self.order is None or k < self.whole:
            return k % self.rows
        return int(self.order[(epoch * self.fraction + k - self.whole) % self.rows])


class MultimodalDataset(torch.utils.data.Dataset[Example]):
    """Map-style over the weighted concatenation of `parts` (tuples in Part's order are fine); its length is an epoch's.

    key: where a configuration names them, for messages.
    """

    key = "data.train"

    def __init__(self, parts: Sequence[tuple], process: Process, ledger: Ledger, seed: int = 0) -> None:
        self.parts = [Part(*part) for part in parts]
        self.process, self.ledger, self.seed = process, ledger, seed
        self._check()
        self._turns = [_Turns(len(part.rows), part.weight, seed, k) for k, part in enumerate(self.parts)]
        self._starts = list(accumulate(map(len, self._turns), initial=0))  # of each part within an epoch, and the end
        if not len(self):
            raise UserError(f"{self.key}: no rows are left; raise the weights or limits of the sources")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Example:
        """The example of position `index`, or of its first good substitute; UserError when none of TRIES is good."""
        for attempt, position in enumerate(chain([index], self.substitutes(index))):
            try:
                return self._load(position)
            except BadSample as error:
                last = f"{self.where(position)}: {error}"
                if attempt == 0:
                    first = last
        raise UserError(
            f"{self.where(index)} is unusable, and so are {TRIES} rows chosen to replace it; see {self.ledger.path}. "
            f"The row: {first}\n"
            f"The last substitute: {last}"
        )

    def __iter__(self) -> Iterator[Example]:
        """The first epoch."""
        return (self[index] for index in range(len(self)))

    def length(self, index: int) -> int:
        """The estimated tokens of a position's row, without opening its media; 0 where the row cannot be read."""
        part, row = self._at(index)
        estimate = getattr(part.process or self.process, "estimate_length", None)
        try:
            return estimate(part.rows[row]) if estimate else 0
        except BadSample:
            return 0

    def where(self, index: int) -> str:
        """Name and row of a position, for messages."""
        part, row = self._at(index)
        return f"{part.name} row {row}"

    def substitutes(self, index: int) -> Iterator[int]:
        """Positions to take in place of `index`, in this order: a pure function of the seed and `index`."""
        position = index % len(self)
        epoch = index - position
        k = self._part_of(position)
        first, last = self._starts[k : k + 2]
        for attempt, draw in enumerate(hashes(TRIES, self.seed, position).tolist()):
            yield epoch + (first + draw % (last - first) if attempt < TRIES // 2 else draw % len(self))

    def _part_of(self, position: int) -> int:
        return bisect_right(self._starts, position) - 1

    def _at(self, index: int) -> tuple[Part, int]:
        """Part and row of a position."""
        epoch, position = divmod(int(index), len(self))
        k = self._part_of(position)
        return self.parts[k], self._turns[k].row(epoch, position - self._starts[k])

    def _load(self, index: int) -> Example:
        part, row = self._at(index)
        sample_id = ""
        try:
            sample = replace(part.rows[row], source=part.name, row=row)  # as the ledger names it
            sample_id = sample.id
            return (part.process or self.process)(sample)
        except BadSample as error:
            self.ledger.add(part.name, row, sample_id, str(error))
            raise

    def _check(self) -> None:
        names = [part.name for part in self.parts]
        if not names:
            raise UserError(f"{self.key}: names no source; expected at least one {{source: ..., path: ...}}")
        if len(set(names)) < len(names):
            raise UserError(
                f"{self.key}: the sources' names must differ, found: {', '.join(names)}; set `name` for each"
            )
        for part in self.parts:
            if not 0 <= part.weight < float("inf"):
                raise UserError(f"{self.key}: {part.name}: weight must be a number from 0 up, found {part.weight}")
            if not len(part.rows):
                raise UserError(f"{self.key}: {part.name}: its file holds no rows; check its path and limit")


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """A DataLoader's worker that was killed is told in one message (UserError); torch speaks of it anywhere in between."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _lost(error) from error


def _lost(error: Exception) -> UserError:
    return UserError(
        f"a process that loads data was killed, mostly for want of memory ({str(error).strip(' .')}); with fewer of "
        "them (training.dataloader_num_workers) or smaller media, start the same command again"
    )


def loaded(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a DataLoader; a UserError from a worker arrives without the traceback that torch puts before it."""
    try:
        yield from loader
    except UserError as error:
        mark = f"{type(error).__module__}.{type(error).__name__}: "
        text = str(error).rpartition(mark)[2] if str(error).startswith("Caught ") else str(error)
        raise type(error)(text.rstrip("\n")) from None
    except (ConnectionError, EOFError) as error:  # in the middle of a batch
        raise _lost(error) from error
