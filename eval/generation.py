"""Ask a model all rows of a benchmark, in batches of like length, and put the answers where the questions stood.

Rows are sorted by what their length can be known from without opening media (kinds and number of media, then letters of
text), longest first, so that a batch holds little padding and memory runs out at once or never. A batch that a bad row
breaks is halved until the row is found; it keeps its reason and earns nothing, the others are answered. Cost: one
generation a batch, log2(batch) more for a bad row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data.schema import BadSample, Sample
from eval.benchmarks.base import Row

Ask = Callable[[list[Sample]], list[str]]


def length(sample: Sample) -> tuple[Any, ...]:
    """Sorts samples by expected length without opening a file."""
    kinds = tuple(sorted(media.modality for media in sample.media))
    return len(kinds), kinds, sum(len(message.text) for message in sample.prompt)


def answer_rows(ask: Ask, rows: list[Row], batch_size: int, label: str = "") -> None:
    """Fill in `prediction`, or `error`, of every row that can be asked; `ask` answers a batch of samples."""
    open_rows = [row for row in rows if row.sample is not None and row.error is None]
    open_rows.sort(key=lambda row: length(row.sample), reverse=True)  # type: ignore[arg-type]
    batches = [open_rows[start : start + batch_size] for start in range(0, len(open_rows), batch_size)]
    for batch in progress(batches, len(open_rows), label):
        _answer(ask, batch)


def _answer(ask: Ask, batch: list[Row]) -> None:
    try:
        texts = ask([row.sample for row in batch if row.sample is not None])
    except BadSample as error:
        if len(batch) == 1:
            batch[0].error = str(error)
            return
        middle = len(batch) // 2
        _answer(ask, batch[:middle])
        _answer(ask, batch[middle:])
    else:
        for row, text in zip(batch, texts, strict=True):
            row.prediction = text


def progress(batches: Iterable[list[Row]], total: int, label: str) -> Iterator[list[Row]]:
    """Tell on standard error how far it is: one line that renews itself on a terminal, else a line a tenth."""
    done, told, start = 0, 0, time.monotonic()
    terminal = sys.stderr.isatty()
    for batch in batches:
        yield batch
        done += len(batch)
        tenth = 10 * done // max(1, total)
        if not terminal and tenth == told:
            continue
        told = tenth
        seconds = time.monotonic() - start
        left = seconds * (total - done) / done
        end = "\r" if terminal and done < total else "\n"
        line = f"{label}: {done}/{total} rows, {done / seconds:.1f}/s, {left:.0f} s left  "
        print(line, end=end, file=sys.stderr, flush=True)
