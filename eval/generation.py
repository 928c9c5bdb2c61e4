"""Ask a model all rows of a benchmark, in batches of like length, and put the answers where the questions stood.

Rows are sorted by their number of tokens, media counted in, longest first: a batch holds little padding, and memory runs
out at once or never. Within steps of a few tokens, rows about one clip stand together: its media tokens are made once a
batch (where a feature cache names them). What is in a batch depends on the rows and the batch size alone, so that neither
a kill and a resume nor the number of ranks changes what the model computes; batches are dealt to the ranks in turn. A
batch that a bad row breaks is halved until the row is found; it keeps its reason and earns nothing, the others are
answered.

Cost: one generation a batch, log2(batch) more for a bad row.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from data.schema import BadSample, Sample
from eval.benchmarks.base import Row

Ask = Callable[[list[Sample]], list[str]]
Length = Callable[[Sample], Any]  # sorts samples
STEP = 8  # tokens: lengths that differ by less count as alike


def by_tokens(estimate: Callable[[Sample], int]) -> Length:
    """Sorts by the estimated number of tokens, in steps, then by media. `estimate`: Processor.estimate_length."""
    return lambda sample: (-(-estimate(sample) // STEP), [media.path for media in sample.media])


def make_batches(rows: Sequence[Row], batch_size: int, length: Length) -> list[list[Row]]:
    """The rows that can be asked, longest first."""
    open_rows = [row for row in rows if row.sample is not None and row.error is None]
    open_rows.sort(key=lambda row: length(row.sample), reverse=True)  # type: ignore[arg-type]
    return [open_rows[start : start + batch_size] for start in range(0, len(open_rows), batch_size)]


def remaining(
    batches: Sequence[Sequence[Row]], answered: Collection[int], rank: int = 0, world: int = 1
) -> list[list[Row]]:
    """What is left of the batches for one of `world` ranks; answered: indices of rows that have their answer."""
    left = [[row for row in batch if row.index not in answered] for batch in batches]
    return [batch for batch in left if batch][rank::world]


def answer_batches(
    ask: Ask, batches: Sequence[list[Row]], keep: Callable[[Sequence[Row]], None], label: str | None = ""
) -> None:
    """Fill in `prediction`, or `error`, of every row; `ask` answers a batch of samples, `keep` stores it. label: of the
    progress; None: none is shown."""
    for batch in batches if label is None else progress(batches, sum(map(len, batches)), label):
        _answer(ask, batch)
        keep(batch)


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
