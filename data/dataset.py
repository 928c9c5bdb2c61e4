"""The rows of all sources as one map-style data set of examples, in which a bad row never stops a run by itself.

    i --index--> (part, row) --Rows--> Sample --process--> Example
                     ^                        | BadSample
                     '--- substitute(i, k) <--' ledger

The substitute's row is a pure function of (seed, i, k), so the batches are the same with any number of workers and
after a resume.

Cost: an index of two integers a row; samples are read, and media decoded, only when asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, Protocol

import numpy as np
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
    """One source in the mixture. weight 2.5: every row twice, and half of them, chosen by the seed, a third time.
    process: for rows with a loader of their own (another media_dir); otherwise the data set's."""

    rows: SampleRows
    weight: float
    name: str
    process: Process | None = None


class MultimodalDataset(torch.utils.data.Dataset[Example]):
    """Map-style over the weighted concatenation of `parts` (tuples in Part's order are fine)."""

    def __init__(self, parts: Sequence[tuple], process: Process, ledger: Ledger, seed: int = 0) -> None:
        self.parts = [Part(*part) for part in parts]
        self.process, self.ledger, self.seed = process, ledger, seed
        self._check()
        rows = [_repeats(len(part.rows), part.weight, seed, k) for k, part in enumerate(self.parts)]
        self._part = np.repeat(np.arange(len(rows), dtype=np.uint16), [len(r) for r in rows])
        self._row = np.concatenate(rows)
        if not len(self._row):
            raise UserError("data.train: no rows are left; raise the weights or limits of the sources")

    def __len__(self) -> int:
        return len(self._row)

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

    def length(self, index: int) -> int:
        """The estimated tokens of a position's row, without opening its media; 0 where the row cannot be read."""
        part = self.parts[self._part[index]]
        estimate = getattr(part.process or self.process, "estimate_length", None)
        try:
            return estimate(part.rows[int(self._row[index])]) if estimate else 0
        except BadSample:
            return 0

    def where(self, index: int) -> str:
        """Name and row of a position, for messages."""
        return f"{self.parts[self._part[index]].name} row {self._row[index]}"

    def substitutes(self, index: int) -> Iterator[int]:
        """Positions to take in place of `index`, in this order: a pure function of the seed and `index`."""
        part = self._part[index]
        first, last = np.searchsorted(self._part, [part, part + 1]).tolist()
        for k, draw in enumerate(hashes(TRIES, self.seed, index).tolist()):
            yield first + draw % (last - first) if k < TRIES // 2 else draw % len(self)

    def _load(self, index: int) -> Example:
        part, row = self.parts[self._part[index]], int(self._row[index])
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
            raise UserError("data.train: names no source; expected at least one {source: ..., path: ...}")
        if len(set(names)) < len(names):
            raise UserError(
                f"data.train: the sources' names must differ, found: {', '.join(names)}; set `name` for each"
            )
        for part in self.parts:
            if not 0 <= part.weight < float("inf"):
                raise UserError(f"data.train: {part.name}: weight must be a number from 0 up, found {part.weight}")
            if not len(part.rows):
                raise UserError(f"data.train: {part.name}: its file holds no rows; check its path and limit")


def _repeats(n: int, weight: float, seed: int, part: int) -> np.ndarray:
    """Rows of one part, weight times each; the fraction's rows are drawn by the seed, and kept in their order."""
    whole, rest = int(weight), round((weight - int(weight)) * n)
    chosen = np.sort(epoch_order(n, part, seed)[:rest])
    return np.concatenate([*[np.arange(n)] * whole, chosen]).astype(np.int64)


def loaded(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a DataLoader; a UserError from a worker arrives without the traceback that torch puts before it."""
    try:
        yield from loader
    except UserError as error:
        mark = f"{type(error).__module__}.{type(error).__name__}: "
        text = str(error).rpartition(mark)[2] if str(error).startswith("Caught ") else str(error)
        raise type(error)(text.rstrip("\n")) from None
