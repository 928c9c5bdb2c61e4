"""The prompt of a publisher's row: its media, then its question, as one user's message, and the true answer.

An instruction such as "Answer with the letter" stands after the question and is not among the keys of the cross-modal
attention; options are, because they are part of what is asked.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.schema import MEDIA, BadSample, Media, Message, Sample, Text, UserError
from data.sources.index import array_rows
from data.sources.rows import read_text, value_of


def ask(
    name: str,
    question: str,
    answer: str,
    media: Sequence[Media],
    *,
    index: int,
    source: str,
    instruction: str = "",
    meta: dict[str, Any] | None = None,
) -> Sample:
    """The sample of one row."""
    after = (Text(f"\n{instruction}"),) if instruction else ()
    asked = Message("user", (*media, Text(question, question=True), *after))
    messages = (asked, Message("assistant", (Text(answer),)))
    return Sample(name, messages, source, index, {**(meta or {}), "question": question})


def own_media(record: dict[str, Any]) -> list[Media]:
    """The media that a row of one's own names by kind: {"image": path, ...}; a list of paths is several."""
    found = []
    for key, (kind, modality) in MEDIA.items():
        paths = record.get(key) or []
        for path in [paths] if isinstance(paths, str) else paths:
            if not isinstance(path, str):
                raise BadSample(f"'{key}' must be a path or a list of paths, found {path!r}")
            found.append(Media(kind, path, modality))
    return found


def read_lines(path: Path) -> list[Any]:
    """The records of a jsonl file, or of a JSON array; a line that is not JSON stays as its text."""
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        return [value_of(raw) for raw in array_rows(path)]
    records = [_json(line) for line in text.split("\n") if line.strip()]
    if not records:
        raise UserError(f"{path}: holds no rows; expected one JSON object on each line")
    return records


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def record_of(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise BadSample(f"expected a JSON object, found {str(value)[:60]!r}")


def read_table(path: Path, delimiter: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a csv or tsv file with a header; UserError where it is none, or a column is missing."""
    csv.field_size_limit(sys.maxsize)  # pictures stand in cells as base64
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            rows, names = list(reader), reader.fieldnames or ()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a file with a header") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; expected a table, save it as UTF-8") from None
    missing = [column for column in columns if column not in names]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; found: {', '.join(names) or 'nothing'}")
    return rows
