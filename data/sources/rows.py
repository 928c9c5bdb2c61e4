"""What all readers share: lazily parsed rows, and a message for every way in which a file or a row can be wrong.

Cost: a row is parsed whenever it is asked for, and nothing of it is kept.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.schema import BadSample, Media, Message, Sample, Text, UserError, local_path, nearest

Parse = Callable[[Any, int], Sample]


class Rows:
    """The samples of one file: `records` hold the raw rows, `parse(record, i)` makes the i-th Sample on demand.

    parse is a module's function or a functools.partial of one, so that Rows can be pickled to spawned workers.
    strip_prefix: folders that are taken off the front of media paths, which then count from media_dir.
    """

    def __init__(self, path: Path, records: Sequence[Any], parse: Parse) -> None:
        self.path, self._records, self._parse = path, records, parse
        self._count = len(records)
        self.strip_prefix: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        """BadSample names the file and the row."""
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        try:
            return _whole(without_prefix(self._parse(self._records[index], index), self.strip_prefix))
        except BadSample as error:
            raise BadSample(f"{self.path}, row {index}: {error}") from None

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def head(self, limit: int) -> Rows:
        """The first `limit` rows."""
        if limit < 1:
            raise UserError(f"{self.path}: limit must be at least 1, found {limit}")
        rows = Rows(self.path, self._records, self._parse)
        rows.strip_prefix = self.strip_prefix
        rows._count = min(limit, self._count)
        return rows


def without_prefix(sample: Sample, prefixes: Iterable[str]) -> Sample:
    """The sample with the first prefix that fits a medium's path taken off it; whole folders only. URLs of files count
    as their paths.

    What remains is relative, and is checked against media_dir like any other path (`..`, links).
    """
    folders = [local_path(prefix).rstrip("/") + "/" for prefix in prefixes]
    if not any(local_path(media.path).startswith(tuple(folders)) for media in sample.media):
        return sample

    def stripped(part: Text | Media) -> Text | Media:
        path = local_path(part.path) if isinstance(part, Media) else ""
        found = next((folder for folder in folders if path.startswith(folder)), None)
        return replace(part, path=path[len(found) :].lstrip("/")) if isinstance(part, Media) and found else part

    messages = tuple(replace(m, content=tuple(stripped(part) for part in m.content)) for m in sample.messages)
    return replace(sample, messages=messages)


def below(folder: Path, path: str) -> str:
    """An absolute path of another machine as one below `folder`: the longest end of it that lies there, else unchanged."""
    parts = Path(path).parts
    if not Path(path).is_absolute() or ".." in parts:
        return path
    ends = ["/".join(parts[k:]) for k in range(1, len(parts))]
    return next((end for end in ends if os.path.isfile(folder / end)), path)  # Path's is_file raises for long names


def existing(path: Path, source: str, folder: bool = False) -> Path:
    """The path, if it is a file (or, with `folder`, a folder); else a UserError with the nearest name in its folder."""
    if path.is_file() or (folder and path.is_dir()):
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


def not_json(error: json.JSONDecodeError, line: int | None = None) -> str:
    """Where and why a text is not JSON. `line`: its number in the file when the text is one line of it."""
    lines = error.doc.split("\n")  # as its line number counts
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


def chosen(option: str, given: dict[str, str] | None, known: dict[str, str]) -> dict[str, str]:
    """The names that a file has for `known` ones: those given, else the usual. UserError for an unknown one."""
    for name in given or {}:
        if name not in known:
            raise UserError(f"option '{option}': unknown name '{name}'{nearest(name, known)}")
    return {**known, **(given or {})}


def text_of(row: Any, key: str, *, where: str = "") -> str:
    """A field that must be a text with something in it. Numbers are taken as text, as published answers have them."""
    if not isinstance(row, dict):
        raise BadSample(f"{where}expected an object, found {describe(row)}")
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str | list | dict):
        raise BadSample(f"{where}'{key}' must be a text, found a {type(value).__name__}: {value}; write it as a text")
    if not isinstance(value, str) or not value.strip():
        raise BadSample(
            f"{where}'{key}' is missing or empty; expected a text, found {value!r} ({columns_of(row, key)})"
        )
    return value


def key_of(row: Any, *keys: str) -> str:
    """The first of these keys that a row has; the very first where it has none."""
    return next((key for key in keys if isinstance(row, dict) and key in row), keys[0])


def columns_of(row: dict[str, Any], missing: str) -> str:
    """What a row has, and which of its names may have been meant by one that it has not."""
    names = [str(name) for name in row]
    close = [] if missing in row else difflib.get_close_matches(missing, names, n=1)
    return f"the row has: {', '.join(names)}" + (f"; is '{missing}' called '{close[0]}' there?" if close else "")


def value_of(raw: Any) -> Any:
    """The JSON value of an index.Raw. BadSample where it is none."""
    where = f"line {raw.line}: " if raw.line else ""
    try:
        return json.loads(raw.text)
    except json.JSONDecodeError as error:
        raise BadSample(not_json(error, raw.line or None)) from None
    except UnicodeDecodeError:
        raise BadSample(f"{where}is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, a thousand brackets
        raise BadSample(f"{where}cannot be read as JSON ({error})") from None


def utf8(raw: Any) -> str:
    """The text of an index.Raw. BadSample where it is no UTF-8."""
    try:
        return raw.text.decode()
    except UnicodeDecodeError:
        raise BadSample(f"line {raw.line}: is not UTF-8 text") from None


def ask(media: Iterable[Media], question: str, answer: str, instruction: str | None = None) -> tuple[Message, Message]:
    """One turn: media, an instruction (no part of the keys), the question; and its answer."""
    before = (Text(f"{instruction}\n"),) if instruction else ()
    content = (*media, *before, Text(question, question=True))
    return Message("user", content), Message("assistant", (Text(answer),))


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
