"""What a benchmark is: rows are loaded, the model is asked, its answers are parsed and scored.

    annotation file --load, prompt--> Row(answer, sample) --model--> Row.prediction --parse, score--> metrics
    predictions file --from_record--> Row(answer, prediction)  ---------------------'   (eval/score.py, no model)

Every score stands under two rules, side by side:

    strict     every row counts, a row that could not be read or an answer that cannot be parsed earns nothing, a row
               counts once, thoughts before an answer (<think> ... </think>) are none of it, and the metric is what its
               paper defines
    official   what the published script makes of the same file, quirks included; where no script was published, or it
               has no quirks, strict once more

A row earns `points` out of `of` (1 of 1 for a right answer, 7 of 10 one-second labels, words minus errors for a
transcript); a rule's score is the sum of the points over the sum of what they are out of, so that one bootstrap and one
paired test serve all of them. Where a score is a sum of several such ratios (MME: accuracy and pairs of each subtask),
each earning names its `group`. Scores are shares between 0 and 1 (`scale`: "share") unless the field gives points
(MME: 0 to 2000).

Scoring needs only what a predictions file holds, never the model, the media or torch. A benchmark = one file with one
subclass, and one line in `eval.benchmarks.BENCHMARKS`. Cost of scoring: linear in the letters of the rows.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from data.schema import BadSample, Sample, UserError
from data.sources import open_source, option_takers
from data.sources.rows import Rows
from eval.benchmarks.fields import Fields
from eval.benchmarks.questions import read_lines
from eval.benchmarks.tags import after_thoughts
from eval.intervals import bootstrap_interval


@dataclass(slots=True)
class Row:
    """One row of a benchmark. unit: what is drawn anew in the bootstrap (the clip or picture that questions share).

    published: a row of a published predictions file, in that file's form of answers, not one of eval/run.py's.
    """

    id: str
    index: int
    answer: str = ""
    prediction: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    unit: str = ""
    error: str | None = None
    sample: Sample | None = None  # what the model is asked; not written into the predictions file
    published: bool = False

    @property
    def said(self) -> str:
        """The prediction without thoughts before it: what the strict rule reads."""
        return after_thoughts(self.prediction)


class Earned(NamedTuple):
    """What was earned, out of what, by which independent unit; a score is the sum over groups of points / of."""

    unit: str
    points: float
    of: float
    group: str = ""


class _Kept(dict[int, str]):
    """For str.translate: punctuation, symbols, separators and control characters become spaces; the rest stays."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        self[code] = " " if unicodedata.category(letter)[0] in "PSCZ" else letter
        return self[code]


_KEPT = _Kept()


@lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """Lower case, no punctuation or symbols, single spaces; letters of every script stay; don't becomes dont."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    return " ".join(text.translate(_KEPT).split())


def unit_of(sample: Sample) -> str:
    """The clip or picture that a sample is about; the sample itself where there is none."""
    if "video_id" in sample.meta:
        return str(sample.meta["video_id"])
    return sample.media[0].path if sample.media else sample.id


def file_stem(path: str) -> str:
    """A file's name without folders and ending; media names of annotations and rows differ in both."""
    return PurePosixPath(path.replace("\\", "/")).stem


def majority(answers: Iterable[str]) -> int:
    """How many answers equal the most frequent one."""
    return max(Counter(answers).values(), default=0)


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def total(earned: Iterable[Earned]) -> float:
    """The score: the sum over groups of points / of."""
    points: Counter[str] = Counter()
    of: Counter[str] = Counter()
    for one in earned:
        points[one.group] += one.points  # type: ignore[assignment]
        of[one.group] += one.of  # type: ignore[assignment]
    return float(sum(share(points[group], of[group]) for group in of))


class Benchmark(ABC):
    """name: as on the command line. source, options: the reader of the annotation file.

    truth_options: further options where only the true answers are wanted. measure: what `score` is. scale: "share" (0
    to 1) or "points". home: where the data come from and where to put them. separated_by: what a published row must
    carry to be told from another one ("media", "question"). index_is_id: the `index` of a published row is the id of its
    annotation. lower_is_better: the score counts errors. empty_truths: an empty true answer is one (silence).
    right_or_wrong: a row by itself is one of the two.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    options: ClassVar[dict[str, Any]] = {}
    truth_options: ClassVar[dict[str, Any]] = {}
    measure: ClassVar[str] = "accuracy"
    scale: ClassVar[str] = "share"
    home: ClassVar[str] = ""
    separated_by: ClassVar[tuple[str, ...]] = ("media", "question")
    index_is_id: ClassVar[bool] = False
    lower_is_better: ClassVar[bool] = False
    empty_truths: ClassVar[bool] = False
    right_or_wrong: ClassVar[bool] = True
    prompt: Callable[..., Sample]  # (record, index, *, options), where there is no source

    # ---- load and prompt ---------------------------------------------------------------------------------------------

    def open(self, path: Path, media_dir: Path | None = None, **options: Any) -> Rows:
        """The samples of an annotation file or folder: what the model is asked, and the true answer.

        They are those of the data source, or, where the benchmark names none, what `prompt` makes of `records`."""
        if self.source:
            return open_source(self.source, path, media_dir=media_dir, **(self.options | options))
        return Rows(path, self.records(path), partial(self.prompt, **options))

    def records(self, path: Path) -> list[Any]:
        """The raw rows of a file that no data source reads."""
        return read_lines(path)

    def load(
        self,
        path: Path,
        limit: int | None = None,
        options: dict[str, Any] | None = None,
        media_dir: Path | None = None,
    ) -> list[Row]:
        """The first `limit` rows of an annotation file; a row that cannot be read stays, with its reason."""
        if not path.exists() and self.home:
            raise UserError(f"benchmark {self.name}: no such annotation file: {path}; {self.home}")
        source = self.open(path, media_dir, **(options or {}))
        count = len(source) if limit is None else min(limit, len(source))
        return [self._row(source, index) for index in range(count)]

    def option_problems(self, options: Mapping[str, Any]) -> list[str]:
        """What is wrong with the `options` of an entry of evaluation.benchmarks, one message each.

        A benchmark's options are the keyword-only arguments of its `open` and `prompt`, and those of the reader of its
        annotation file.
        """
        from encoders.options import option_problems

        readers = option_takers(self.source) if self.source else ()
        return option_problems(options, *readers, self.open, *([self.prompt] if hasattr(self, "prompt") else []))

    def _row(self, source: Any, index: int) -> Row:
        try:
            sample = source[index]
        except BadSample as error:
            return Row(id=str(index), index=index, unit=f"row {index}", error=str(error))
        has_truth = sample.answer or self.empty_truths
        return Row(
            id=sample.id,
            index=index,
            answer=sample.answer,
            meta=dict(sample.meta),
            unit=unit_of(sample),
            error=None if has_truth else f"{sample.source}, row {sample.row}: there is no answer to compare with",
            sample=sample,
        )

    def from_record(self, fields: Fields, index: int) -> Row:
        """A row of a predictions file, eval/run.py's or a published one; `error` says what is wrong with it."""
        row = Row(id=fields.id or str(index), index=index, prediction=fields.prediction, published=not fields.own)
        row.answer = self.truth(fields)
        row.meta = fields.meta
        row.unit = fields.unit or fields.media or f"row {row.id}"
        has_truth = row.answer or (self.empty_truths and fields.has_truth)
        row.error = fields.error or (None if has_truth else "the row holds no true answer to compare with")
        if row.error is None and row.published:
            row.error = self.truth_error(row)
        return row

    def truth(self, fields: Fields) -> str:
        """The true answer that a record holds; "" where it holds none."""
        return fields.truth

    def same_truth(self, row: Row, truth: Row) -> bool:
        """Whether a row's own true answer is that of an annotation."""
        return normalise(row.answer) == normalise(truth.answer)

    def media_names(self, truth: Row) -> set[str]:
        """What the media of an annotation may be called in a predictions file, without folders and ending."""
        return {file_stem(part.path) for part in truth.sample.media} if truth.sample else set()

    def options_for(self, found: Sequence[Fields]) -> dict[str, Any]:
        """The options under which an annotation file holds the truths of these rows of a predictions file."""
        return self.truth_options

    def covers_other_splits(self, path: Path, rows: int) -> bool:
        """Whether an annotation file holds more than the split that is asked, by its name and its number of rows."""
        return False

    def truth_error(self, row: Row) -> str | None:
        """Why the true answer of a published row is none of this benchmark's (it may be another one's row)."""
        return None

    # ---- parse -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def parse(self, text: str) -> Any | None:
        """The model's text as an answer of this benchmark; None where it is none."""

    def reading(self, row: Row) -> Any | None:
        """The row's answer under the strict rule; None where it cannot be parsed or the row is bad."""
        return self.parse(row.said) if row.error is None else None

    def official_reading(self, row: Row) -> Any | None:
        """The row's answer as the published script reads it."""
        return self.reading(row)

    # ---- score -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def points(self, row: Row) -> tuple[float, float]:
        """What the row earns, out of what. Must hold for rows without an answer of their own, too."""

    def strict(self, rows: Sequence[Row]) -> list[Earned]:
        return [Earned(row.unit, *self.points(row)) for row in rows]

    def official(self, rows: Sequence[Row]) -> list[Earned]:
        return self.strict(rows)

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Figures of this benchmark besides the score: shares as floats, tables as a mapping of mappings."""
        return {}

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {}

    def score(self, rows: Sequence[Row], filed: Sequence[Row] | None = None) -> dict[str, Any]:
        """The score and its 95 % interval under each rule, and counts (unparsed and bad rows are wrong).

        rows: each row once, as the strict rule counts them. filed: the rows as a published script finds them in the
        file, repeated ones included; default: the same. `score`, `interval` and `metrics` are those of the strict rule.
        """
        filed = rows if filed is None else filed
        bad = sum(row.error is not None for row in rows)
        strict = self._rule(self.strict(rows), rows, self.reading)
        official = self._rule(self.official(filed), filed, self.official_reading)
        details = self.details(rows)
        return {
            "benchmark": self.name,
            "measure": self.measure,
            "scale": self.scale,
            "score": strict["score"],
            "interval": strict["interval"],
            "rows": len(rows),
            "parsed": strict["parsed"],
            "unparsed": strict["unparsed"] - bad,
            "duplicates": 0,
            "bad": bad,
            "metrics": details,
            "rules": {"strict": strict | details, "official": official | self.official_details(filed)},
        }

    def _rule(self, earned: list[Earned], rows: Sequence[Row], reading: Any) -> dict[str, Any]:
        parsed = sum(reading(row) is not None for row in rows)
        return {
            "score": total(earned),
            "interval": bootstrap_interval(
                [(one.points, one.of) for one in earned],
                [one.unit for one in earned],
                groups=[one.group for one in earned],
            ),
            "rows": len(rows),
            "parsed": parsed,
            "unparsed": len(rows) - parsed,
        }

    def correct(self, row: Row) -> bool:
        """Whether all that the row could earn was earned."""
        points, of = self.points(row)
        return of > 0 and points == of

    def earnings(self, rows: Sequence[Row]) -> list[str]:
        """What each of all rows earned, in words."""
        return [f"{points:g} of {of:g}" for points, of in map(self.points, rows)]

    def to_json(self, row: Row) -> dict[str, Any]:
        """One line of the predictions file."""
        points, of = self.points(row)
        return {
            "id": row.id,
            "index": row.index,
            "prediction": row.prediction,
            "answer": row.answer,
            "parsed": self.reading(row),
            "correct": self.correct(row),
            "points": points,
            "of": of,
            "unit": row.unit,
            "meta": row.meta,
            "error": row.error,
        }


class RightOrWrong(Benchmark):
    """A benchmark whose rows have one right answer each: 1 of 1, or 0 of 1."""

    @abstractmethod
    def truth_of(self, row: Row) -> str | None:
        """The true answer as readings give it; None where the row has none."""

    def right(self, row: Row, reading: Callable[[Row], Any]) -> bool:
        truth = self.truth_of(row)
        return truth is not None and reading(row) == truth

    def points(self, row: Row) -> tuple[float, float]:
        return float(self.right(row, self.reading)), 1.0

    def official(self, rows: Sequence[Row]) -> list[Earned]:
        return [Earned(row.unit, float(self.right(row, self.official_reading)), 1.0) for row in rows]
