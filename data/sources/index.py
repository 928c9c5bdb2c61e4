"""Where the rows of a file lie: byte spans, found in one reading, from which a row is read when it is asked for.

    lines       a span a line (jsonl, csv, transcripts), of one file or of many
    elements    a span an element of a JSON array; the file is parsed in windows, never held whole

Cost: one pass over the file (JSON is parsed on the way where a row can hold several answers), then 28 bytes a row,
whatever the row holds; reading a row opens its file anew, so that an index can be pickled to workers.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.schema import UserError
from data.sources.rows import describe, not_json, read_text

WINDOW = 2**20  # characters of a JSON array that are parsed at a time
TRIED = 20  # lines; a file in which none of so many is JSON is no jsonl
_ENTRY = struct.Struct("<IqqII")
_TABLE = np.dtype([("file", "<u4"), ("start", "<i8"), ("size", "<i8"), ("number", "<u4"), ("turn", "<u4")])
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"

Count = Callable[[Any], int]  # answers in a parsed row; below 1 counts as 1, so that a bad row has its place


class Raw(NamedTuple):
    """A row as its file has it. number: of the line, or of the element of an array, from 1. turn: which of its answers."""

    text: bytes
    number: int
    turn: int
    path: Path
    of_array: bool = False

    @property
    def line(self) -> int:
        """0 for an element of an array."""
        return 0 if self.of_array else self.number

    @property
    def place(self) -> str:
        return f"{'element' if self.of_array else 'line'} {self.number}"


class Spans(Sequence[Raw]):
    """Rows by their places in `files`."""

    def __init__(self, files: Sequence[Path], table: bytes | bytearray, of_array: bool = False) -> None:
        self.files, self.of_array = list(files), of_array
        self._table = np.frombuffer(table, _TABLE)

    def __len__(self) -> int:
        return len(self._table)

    def without_first(self) -> Spans:
        """The rows below a header."""
        return Spans(self.files, self._table[1:].tobytes())

    def __getitem__(self, index: Any) -> Any:
        file_number, start, size, number, turn = self._table[index].item()
        path = self.files[file_number]
        try:
            with path.open("rb") as file:
                file.seek(start)
                return Raw(clean(file.read(size)), number, turn, path, self.of_array)
        except OSError as error:
            raise UserError(f"{path}: cannot be read any more ({error.strerror}); bring the file back") from None


def clean(line: bytes) -> bytes:
    return line.removeprefix(_BOM).strip()


def lines(paths: Iterable[Path], skip: Callable[[bytes], bool] | None = None) -> Spans:
    """Every line with something in it, file after file; without those that `skip` says."""
    files, table = list(paths), bytearray()
    for number, path in enumerate(files):
        for offset, line, size, text in _lines(path):
            if not (skip and skip(text)):
                table += _ENTRY.pack(number, offset, size, line, 0)
    return Spans(files, table)


def json_rows(path: Path, shape: str, answers: Count | None = None) -> Spans:
    """Rows of a jsonl file or of a JSON array, one for each answer. shape: what a row looks like, for messages.

    UserError: a file of neither form (none of its first lines is JSON), or without rows. Any other line that is no JSON
    is a row, and bad when it is asked for.
    """
    if first_character(path) == "[":
        return array_rows(path, answers)
    table, is_jsonl = bytearray(), False
    mistakes: list[str] = []  # of the lines before the first that is JSON
    for offset, line, size, text in _lines(path):
        if not is_jsonl and (mistake := _mistake(text, line)):
            mistakes.append(f"{path}, {mistake}; expected {shape} on each line")
            if len(mistakes) == TRIED:
                break
        else:
            is_jsonl = True
        for turn in range(_count(text, answers)):
            table += _ENTRY.pack(0, offset, size, line, turn)
    if not is_jsonl:
        raise UserError(mistakes[0] if mistakes else f"{path}: holds no rows; expected {shape} on each line")
    return Spans([path], table)


def array_rows(path: Path, answers: Count | None = None) -> Spans:
    """Elements of a JSON array, one row for each answer. UserError with line and column where it is none."""
    table = bytearray()
    for number, (start, size, value) in enumerate(elements(path), start=1):
        for turn in range(max(1, answers(value)) if answers else 1):
            table += _ENTRY.pack(0, start, size, number, turn)
    if not table:
        raise UserError(f"{path}: the JSON array holds no rows")
    return Spans([path], table, of_array=True)


def elements(path: Path, window: int = WINDOW) -> Iterator[tuple[int, int, Any]]:
    """(first byte, bytes, value) of every element of a JSON array. UserError with line and column where it breaks."""
    with _Window(path, window) as text:
        if text.peek() != "[":
            raise UserError(_no_array(path))
        text.step()
        following = ","
        if text.peek() == "]":
            text.step()
            following = "]"
        while following == ",":
            start = text.offset
            value = text.value()
            yield start, text.offset - start, value
            following = text.peek()
            if following not in (",", "]"):
                raise UserError(_broken(path, text.offset, "Expecting ',' delimiter"))
            text.step()
            text.peek()
        if text.peek():
            raise UserError(_broken(path, text.offset, "Extra data"))


class _Window:
    """A JSON text read `size` characters at a time, parsed from a position on. offset: that position in bytes.

    It is decoded with `surrogateescape`, so that broken bytes keep their places and spoil one row only.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.text, self.at = "", 0
        self._decode = json.JSONDecoder().raw_decode

    def __enter__(self) -> _Window:
        try:
            with self.path.open("rb") as file:
                self.offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            self._file = self.path.open(encoding="utf-8", errors="surrogateescape", newline="")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        self._file.seek(self.offset)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def peek(self) -> str:
        """The next character that is no white space; '' at the end of the file."""
        while True:
            end = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            self.offset, self.at = self.offset + end - self.at, end
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def step(self) -> None:
        """Over one ASCII character."""
        self.at, self.offset = self.at + 1, self.offset + 1

    def value(self) -> Any:
        """The JSON value that begins here; afterwards the position is behind it."""
        while True:
            try:
                value, end = self._decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16  # "-Infinity", "\\uabcd"
                if cut and self._grow():
                    continue
                raise UserError(_broken(self.path, self.offset + self._bytes(error.pos), error.msg)) from None
            except (ValueError, RecursionError) as error:  # a number of 5000 digits, a thousand brackets
                raise UserError(_broken(self.path, self.offset, str(error))) from None
            whole = end < len(self.text) and self.text[end] not in "0123456789.eE+-"  # a number may go on behind
            if whole or not self._grow():
                self.offset, self.at = self.offset + self._bytes(end), end
                return value

    def _bytes(self, end: int) -> int:
        return len(self.text[self.at : end].encode(errors="surrogateescape"))

    def _grow(self) -> bool:
        piece = self._file.read(max(self.size, len(self.text) - self.at))
        if piece:
            self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)


def _lines(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(first byte, number from 1, bytes, text without white space) of every line with something in it."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = clean(line)
                if text:
                    yield offset, number, len(line), text
                offset += len(line)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _count(text: bytes, answers: Count | None) -> int:
    if answers is None:
        return 1
    try:
        return max(1, answers(json.loads(text)))
    except (ValueError, RecursionError):
        return 1


def first_character(path: Path) -> str:
    """The first that is no white space; '' of an empty file."""
    try:
        with path.open("rb") as file:
            return file.read(4096).removeprefix(_BOM).lstrip()[:1].decode("latin-1")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _mistake(text: bytes, line: int) -> str | None:
    """Why a line is not JSON."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return not_json(error, line)
    except UnicodeDecodeError:
        return f"line {line}: is not UTF-8 text"
    except (ValueError, RecursionError):
        return None  # JSON, but beyond what Python reads: a bad row
    return None


def _no_array(path: Path) -> str:
    """What a file is that should have been a JSON array."""
    text = read_text(path)
    try:
        return f"{path}: expected a JSON array of rows, found {describe(json.loads(text))}"
    except json.JSONDecodeError as error:
        return f"{path}, {not_json(error)}"
    except (ValueError, RecursionError) as error:
        return f"{path}: expected a JSON array of rows ({error})"


def _broken(path: Path, offset: int, reason: str) -> str:
    """The message of a JSON array that breaks off at a byte: its line, its column, and what stands there."""
    with path.open("rb") as file:
        before, rest = file.read(offset).removeprefix(_BOM), file.readline()
    try:
        rest.decode()
    except UnicodeDecodeError as error:
        return f"{path}: is not UTF-8 text (byte {offset + error.start}); expected annotations, save them as UTF-8"
    line = before[before.rfind(b"\n") + 1 :].decode(errors="replace")
    place = f"line {1 + before.count(bytes([10]))}, column {len(line) + 1}"
    return f"{path}, {place}: is not JSON ({reason}); found {(line + rest.decode()).strip()[:60]!r}"
