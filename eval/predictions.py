"""Predictions files: read whatever is in them, set each row beside the truth, and say what is wrong.

    lines --read--> Fields --collect--> rows: what the strict rule counts, each row once; rows without a prediction
                                        filed: what a published script finds, repeated rows included

A line that cannot be read, a row without a true answer, a repeated, an extra or a missing one: each is counted, and the
first of each kind are named; none is dropped in silence. Two rows are the same row where they have the same content (id,
media, question, truth, kind) and, if the file's `index` numbers the rows of the data set (no number stands for two
contents), the same index. With annotations, two rows for one annotation are the same row, and rows whose own truth,
media or question is another than their annotation's are told.

Cost: linear in the letters of the file; annotations are found by id or by the name of their media.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from data.schema import Text, UserError
from eval.benchmarks.base import Benchmark, Row, file_stem, normalise
from eval.benchmarks.fields import Fields, take_apart

SHOWN = 10  # problems that are told in full
NAMED = 3  # rows that a problem names
PLACEHOLDER = re.compile(r"<[A-Z]\w*>")  # of MUSIC-AVQA's questions, `How many <Object> ...`
NO_PREDICTION = "there is no prediction for this row"


@dataclass
class Collected:
    """keys: what names each of `rows`, the same in another file about the same rows; None where nothing does.

    broken: lines that are not among `rows` because the annotation that they belong to is, as a missing one.
    """

    rows: list[Row] = field(default_factory=list)
    keys: list[Hashable] = field(default_factory=list)
    filed: list[Row] = field(default_factory=list)
    lines: int = 0
    duplicates: int = 0
    missing: int = 0
    extra: int = 0
    broken: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, row: Row, key: Hashable) -> None:
        self.rows.append(row)
        self.keys.append(key)

    def tell(self, what: str, names: Sequence[object]) -> None:
        """A problem of some rows, the first of which it names."""
        if names:
            shown = ", ".join(str(name)[:60] for name in names[:NAMED])
            self.problems.append(f"{len(names)} rows {what}: {shown}{', ...' if len(names) > NAMED else ''}")


def read(path: Path) -> list[Fields]:
    """The rows of a predictions file, jsonl or a JSON array; UserError where there is no such file."""
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: the predictions file cannot be read ({error.strerror})") from None
    whole = _loads(text) if text.lstrip()[:1] == "[" else None
    if isinstance(whole, list):
        return [take_apart(record) for record in whole]
    return [_line(line) for line in text.split("\n") if line.strip()]


def _line(line: str) -> Fields:
    record = _loads(line)
    return take_apart(record) if record is not None else Fields(error=f"is not JSON: {line[:60]!r}", readable=False)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def collect(
    benchmark: Benchmark, found: Sequence[Fields], truths: Sequence[Row] | None = None, other_splits: bool = False
) -> Collected:
    """Set rows beside their truth: their own, or that of `truths`, the rows of an annotation file.

    other_splits: the file covers more than the split that was asked; rows without a prediction are not missing then.
    """
    result = Collected(lines=len(found))
    rows = [benchmark.from_record(fields, number) for number, fields in enumerate(found)]
    if truths is not None and any(_is_named(benchmark, fields) for fields in found if fields.readable):
        _by_annotations(benchmark, found, rows, truths, result, other_splits)
    else:
        if truths is not None and found:
            result.problems.append("no row names its id or media, so that no annotation can be found: not used")
        _by_themselves(benchmark, found, rows, result)
    result.filed = [row for row, fields in zip(rows, found, strict=True) if fields.readable]
    bad = [(number, row) for number, row in enumerate(rows, 1) if row.error is not None]
    result.problems += [f"row {number}: {row.error}" for number, row in bad[:SHOWN]]
    if len(bad) > SHOWN:
        result.problems.append(f"and {len(bad) - SHOWN} more such rows")
    return result


def _is_named(benchmark: Benchmark, fields: Fields) -> bool:
    return bool(fields.id or fields.media or (benchmark.index_is_id and fields.index is not None))


def _identity(fields: Fields) -> Hashable:
    """What a row is about: for eval/run.py's rows, their place and what was asked there."""
    if not fields.own:
        return fields.content
    return (fields.id, fields.index, fields.unit, str(fields.meta.get("question")), fields.truth)


# ---- without annotations ---------------------------------------------------------------------------------------------


def _by_themselves(benchmark: Benchmark, found: Sequence[Fields], rows: Sequence[Row], result: Collected) -> None:
    names = _names(benchmark, found)
    seen: set[Hashable] = set()
    times: dict[str, int] = defaultdict(int)
    repeated: list[str] = []
    for number, (fields, row, name) in enumerate(zip(found, rows, names, strict=True), 1):
        if name is not None and name in seen:
            repeated.append(f"row {number}")
            continue
        seen.add(name)
        content = f"{fields.id}#{fields.index}" if fields.own else fields.content
        result.add(row, None if name is None else (content, times[content]))
        times[content] += 1
    result.duplicates = len(repeated)
    result.tell("stand in the file again and do not count", repeated)


def _names(benchmark: Benchmark, found: Sequence[Fields]) -> list[Hashable]:
    """What tells each row from the others of the file; None where nothing does."""
    contents: dict[int, set[str]] = defaultdict(set)
    for fields in found:
        if fields.index is not None:
            contents[fields.index].add(fields.content)
    of_data_set = all(len(same) == 1 for same in contents.values())
    names: list[Hashable] = []
    for fields in found:
        if not fields.readable:
            names.append(None)
        elif fields.own and (fields.id or fields.index is not None):
            names.append(_identity(fields))
        elif fields.id or all(getattr(fields, part) for part in benchmark.separated_by):
            names.append((fields.index if of_data_set else None, fields.content))
        else:
            names.append(None if fields.index is None else (str(fields.rank), fields.index, fields.content))
    return names


# ---- with annotations ------------------------------------------------------------------------------------------------


def _by_annotations(
    benchmark: Benchmark, found: Sequence[Fields], rows: list[Row], truths: Sequence[Row], result: Collected,
    other_splits: bool,
) -> None:  # fmt: skip
    lookup = Lookup(benchmark, truths)
    used: set[int] = set()
    place_of: dict[Hashable, int] = {}  # of rows by what they are about: the same row again is the same annotation
    told: dict[str, list[str]] = {"are missing": [], "are extra": [], "are repeated": [], "are not readable": []}
    broken: list[Row] = []
    for number, fields in enumerate(found):
        name = f"row {number + 1}"
        if not fields.readable:
            broken.append(rows[number])
            told["are not readable"].append(name)
            continue
        places = lookup.find(fields, rows[number])
        if not places:
            told["are extra"].append(name)
            continue
        free = next((place for place in places if place not in used), places[0])
        place = place_of.setdefault(_identity(fields), free)
        for what in lookup.unlike(fields, rows[number], place):
            told.setdefault(f"have another {what} than their annotation, whose own counts", []).append(name)
        rows[number] = _beside(rows[number], truths[place], fields)
        if place in used:
            told["are repeated"].append(name)
            continue
        used.add(place)
        result.add(rows[number], place)
    missing = [place for place in range(len(truths)) if place not in used]
    if other_splits:
        result.problems.append(f"{len(missing)} annotations have no row: taken for other splits, which were not asked")
        missing = []
        for row in broken:
            result.add(row, None)
    else:  # the annotation of a broken line is among the missing ones, and counts there
        result.broken = len(broken)
    for place in missing:
        result.add(replace(truths[place], error=NO_PREDICTION), place)
        told["are missing"].append(truths[place].id)
    result.missing, result.extra, result.duplicates = (
        len(told[what]) for what in ("are missing", "are extra", "are repeated")
    )
    for what, names in told.items():
        result.tell(what, names)


def _beside(row: Row, truth: Row, fields: Fields) -> Row:
    """The row with the annotation's truth in place of its own."""
    error = truth.error or fields.error
    meta = {**row.meta, **truth.meta}
    return replace(row, id=truth.id, answer=truth.answer, meta=meta, unit=truth.unit, error=error)


class Lookup:
    """The annotation rows that a row of a predictions file may belong to."""

    def __init__(self, benchmark: Benchmark, truths: Sequence[Row]) -> None:
        self.benchmark, self.truths = benchmark, truths
        self.media_suffices = "question" not in benchmark.separated_by
        self.by_id: dict[str, list[int]] = defaultdict(list)
        self.by_media: dict[str, list[int]] = defaultdict(list)
        self.questions = [_question(row) for row in truths]
        self.bare = [normalise(str(row.meta.get("asked", ""))) for row in truths]  # without options
        for place, row in enumerate(truths):
            for name in {row.id, str(row.meta.get("question_id", row.id))}:
                self.by_id[name].append(place)
            for stem in benchmark.media_names(row):
                self.by_media[stem].append(place)

    def find(self, fields: Fields, row: Row) -> list[int]:
        """Places of the annotations, the likeliest first; empty where none is meant.

        Of several, those whose file lies in the most like folders; of these, first those with the row's own truth.
        """
        places = self._candidates(fields)
        if len(places) < 2:
            return places
        likeness = {place: self._likeness(fields.media or fields.unit, place) for place in places}
        most = max(likeness.values())
        closest = [place for place in places if likeness[place] == most]
        return sorted(closest, key=lambda place: not self.benchmark.same_truth(row, self.truths[place]))

    def _likeness(self, media: str, place: int) -> int:
        """How many of the last parts of a path are those of the annotation's media."""
        sample = self.truths[place].sample
        paths = [part.path for part in sample.media] if sample else []
        return max((_common_end(media, path) for path in paths), default=0)

    def _candidates(self, fields: Fields) -> list[int]:
        if fields.own:
            same = self.by_id.get(fields.id, [])
            exact = [place for place in same if self.truths[place].index == fields.index]
            if not same and self.media_suffices:  # an id that counts the lines of another file
                return self.by_media.get(file_stem(fields.unit), [])
            return exact or same
        near = self.by_media.get(file_stem(fields.media), []) if fields.media else []
        number = str(fields.index) if self.benchmark.index_is_id and fields.index is not None else ""
        if by_id := self.by_id.get(fields.id or number, []):
            here = [place for place in by_id if place in near]
            if here or not near:
                return here or by_id
            if fields.id:
                return []
        if self.media_suffices or not near:
            return near
        if len(near) == 1 and not fields.question and not fields.id:
            return near
        return self._asked(near, normalise(fields.question))

    def unlike(self, fields: Fields, row: Row, place: int) -> list[str]:
        """What a row says otherwise than its annotation."""
        truth = self.truths[place]
        if truth.error is not None or fields.error is not None:
            return []
        found = []
        if row.answer and not self.benchmark.same_truth(row, truth):
            found.append("true answer")
        media = file_stem(fields.unit if fields.own else fields.media)
        known = {file_stem(truth.unit), *self.benchmark.media_names(truth)}
        if media and media not in known and not self.benchmark.index_is_id:  # MMBench's pictures have no names
            found.append("medium")
        if not self._is_asked(fields.question or str(row.meta.get("question") or ""), place):
            found.append("question")
        return found

    def _is_asked(self, question: str, place: int) -> bool:
        """Whether a row's question, if it names one, is the annotation's, or part of it, or the other way round."""
        said, known = normalise(question), [text for text in (self.questions[place], self.bare[place]) if text]
        if self.media_suffices or not said or not known or PLACEHOLDER.search(question):
            return True
        return any(text in said or said in text for text in known)

    def _asked(self, near: list[int], question: str) -> list[int]:
        """Those whose question it is, word for word or as part of a prompt."""
        for known in (self.questions, self.bare):
            if equal := [place for place in near if known[place] and known[place] == question]:
                return equal
        for known in (self.questions, self.bare):
            if part := [place for place in near if known[place] and known[place] in question]:
                return part
        return []


def _question(row: Row) -> str:
    if row.sample is None:
        return ""
    parts = [part for message in row.sample.prompt for part in message.content if isinstance(part, Text)]
    return normalise(" ".join(part.text for part in parts if part.question))


def _common_end(one: str, other: str) -> int:
    """How many folders, from the file up, two paths share."""
    folders = [PurePosixPath(path.replace("\\", "/")).parts[-2::-1] for path in (one, other)]
    return next((k for k, (a, b) in enumerate(zip(*folders, strict=False)) if a != b), min(map(len, folders)))
