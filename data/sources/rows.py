"""What all readers share: lazily parsed rows, and a message for every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.schema import BadSample, Sample, Text, UserError, nearest

Parse = Callable[[Any, int], Sample]


class Rows:
    """The samples of one file: `records` hold the raw rows, `parse(record, i)` makes the i-th Sample on demand.

    parse is a module's function or a functools.partial of one, so that Rows can be pickled to spawned workers.
    """

    def __init__(self, path: Path, records: Sequence[Any], parse: Parse) -> None:
        self.path, self._records, self._parse = path, records, parse
        self._count = len(records)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        """BadSample names the file and the row."""
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        try:
            return _whole(self._parse(self._records[index], index))
        except BadSample as error:
            raise BadSample(f"{self.path}, row {index}: {error}") from None

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def head(self, limit: int) -> Rows:
        """The first `limit` rows."""
        if limit < 1:
            raise UserError(f"{self.path}: limit must be at least 1, found {limit}")
        rows = Rows(self.path, self._records, self._parse)
        rows._count = min(limit, self._count)
        return rows


def existing(path: Path, source: str) -> Path:
    """The path, if it is a file; otherwise a UserError with the nearest name in its folder."""
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path}: is a folder; data source '{source}' wants the annotation file in it")
    if not path.parent.is_dir():
        raise UserError(
            f"{path}: the annotation file for '{source}' is not there, nor is its folder; correct `path` or fetch the "
            "data"
        )
    others = [entry.name for entry in sorted(path.parent.iterdir())[:50]]
    hint = nearest(path.name, others) if others else "; its folder is empty"
    raise UserError(f"{path}: the annotation file for '{source}' is not there{hint}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (byte {error.start}); expected annotations, save them as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_array(path: Path, text: str) -> list[Any]:
    """The rows of a JSON array; UserError with line and column where it is not one."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, {not_json(error)}") from None
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a JSON array of rows, found {describe(value)}")
    if not value:
        raise UserError(f"{path}: the JSON array holds no rows")
    return value


def not_json(error: json.JSONDecodeError, line: int | None = None) -> str:
    """Where and why a text is not JSON. `line`: its number in the file when the text is one line of it."""
    lines = error.doc.splitlines() or [""]
    shown = lines[min(error.lineno, len(lines)) - 1].strip()[:60]
    return f"line {line or error.lineno}, column {error.colno}: is not JSON ({error.msg}); found {shown!r}"


def describe(value: Any) -> str:
    """A JSON value in a few words, for messages."""
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    name = names.get(type(value), "null")
    return f"{name} with keys {', '.join(map(str, list(value)[:8]))}" if isinstance(value, dict) else name


def text_of(row: Any, key: str, *, where: str = "") -> str:
    """A field that must be a text with something in it. Numbers are taken as text, as published answers have them."""
    if not isinstance(row, dict):
        raise BadSample(f"{where}expected an object, found {describe(row)}")
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadSample(
            f"{where}'{key}' is missing or empty; expected a text, found {value!r} (the row has: "
            f"{', '.join(map(str, row))})"
        )
    return value


def _whole(sample: Sample) -> Sample:
    """The sample, unless a text of it holds half a surrogate pair: JSON may ("\\ud83d"), no tokenizer or file can."""
    parts = [part for message in sample.messages for part in message.content]
    for text in (sample.id, *(part.text if isinstance(part, Text) else part.path for part in parts)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            near = text[max(0, error.start - 20) : error.end + 20]
            raise BadSample(
                f"a text holds half a character, {text[error.start]!r} in {near!r} (cut in the middle of an emoji?); "
                "complete or remove it"
            ) from None
    return sample
