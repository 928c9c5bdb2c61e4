"""What a benchmark is: rows are loaded, the model answers, the answers are parsed and scored.

    annotation file --load--> Row(answer, sample) --model--> Row.prediction --score--> metrics

Scoring needs only what a predictions file holds (id, prediction, answer, meta), never the model or the media. Every row
counts: a row that could not be read or an answer that cannot be parsed earns nothing and is counted by name. A row
earns `points` out of `of` (1 of 1 for a right answer, 7 of 10 one-second labels, words minus errors for a transcript);
a benchmark's score is the sum of the points over the sum of what they are out of, so that one bootstrap serves all of
them.

A benchmark = one file with one subclass, and one line in `eval.benchmarks.BENCHMARKS`. Cost of scoring: linear in the
rows.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from data.schema import BadSample, Sample
from data.sources import open_source
from eval.intervals import bootstrap_interval


@dataclass(slots=True)
class Row:
    """One row of a benchmark. unit: what is drawn anew in the bootstrap (the clip or picture that questions share)."""

    id: str
    index: int
    answer: str = ""
    prediction: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    unit: str = ""
    error: str | None = None
    sample: Sample | None = None  # what the model is asked; not written into the predictions file


def normalise(text: str) -> str:
    """Lower case, no punctuation or symbols, single spaces; letters of every script stay; don't becomes dont."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    kept = (" " if unicodedata.category(letter)[0] in "PSCZ" else letter for letter in text)
    return " ".join("".join(kept).split())


def unit_of(sample: Sample) -> str:
    """The clip or picture that a sample is about; the sample itself where there is none."""
    if "video_id" in sample.meta:
        return str(sample.meta["video_id"])
    return sample.media[0].path if sample.media else sample.id


def majority(answers: Iterable[str]) -> int:
    """How many answers equal the most frequent one."""
    return max(Counter(answers).values(), default=0)


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class Benchmark(ABC):
    """name: as on the command line. source, options: the reader of the annotation file. measure: what `score` is."""

    name: ClassVar[str]
    source: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    measure: ClassVar[str] = "accuracy"

    def load(self, path: Path, limit: int | None = None, options: dict[str, Any] | None = None) -> list[Row]:
        """The first `limit` rows of an annotation file; a row that cannot be read stays, with its reason."""
        source = open_source(self.source, path, **(self.options | (options or {})))
        count = len(source) if limit is None else min(limit, len(source))
        return [self._row(source, index) for index in range(count)]

    def _row(self, source: Any, index: int) -> Row:
        try:
            sample = source[index]
        except BadSample as error:
            return Row(id=str(index), index=index, unit=f"row {index}", error=str(error))
        return Row(
            id=sample.id,
            index=index,
            answer=sample.answer,
            meta=dict(sample.meta),
            unit=unit_of(sample),
            error=None if sample.answer else f"{sample.source}, row {sample.row}: there is no answer to compare with",
            sample=sample,
        )

    @abstractmethod
    def parse(self, text: str) -> Any | None:
        """The model's text as an answer of this benchmark; None where it is none."""

    @abstractmethod
    def points(self, row: Row) -> tuple[float, float]:
        """What the row earns, out of what. Must hold for rows without an answer of their own, too."""

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Figures of this benchmark besides the score: shares as floats, tables as a mapping of mappings."""
        return {}

    def score(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The score and its 95 % interval (shares), counts (unparsed and bad are wrong), and `metrics`: details."""
        earned = [self.points(row) for row in rows]
        parsed = sum(row.error is None and self.parse(row.prediction) is not None for row in rows)
        bad = sum(row.error is not None for row in rows)
        return {
            "benchmark": self.name,
            "measure": self.measure,
            "score": share(sum(points for points, _ in earned), sum(of for _, of in earned)),
            "interval": bootstrap_interval(earned, [row.unit for row in rows]),
            "rows": len(rows),
            "parsed": parsed,
            "unparsed": len(rows) - bad - parsed,
            "bad": bad,
            "metrics": self.details(rows),
        }

    def to_json(self, row: Row) -> dict[str, Any]:
        """One line of the predictions file. correct: all that the row could earn was earned."""
        points, of = self.points(row)
        return {
            "id": row.id,
            "index": row.index,
            "prediction": row.prediction,
            "answer": row.answer,
            "parsed": self.parse(row.prediction) if row.error is None else None,
            "correct": of > 0 and points == of,
            "points": points,
            "of": of,
            "unit": row.unit,
            "meta": row.meta,
            "error": row.error,
        }
