"""Answers on disk as they come, so that a killed evaluation goes on where it was: nothing is asked twice, nothing lost.

    RUN/predictions/NAME.journal-DIGEST/RANK-N.jsonl
        {"journal": 1, "settings": {...}}                                what these answers were given under
        {"index": 7, "prediction": "two", "error": null}                 one line a row, in the order of answering

DIGEST stands for all settings that change answers (weights, base, rows, control, length of answers, libraries), so that
answers of other settings lie in another folder and are never mixed in. Every process that answers writes a file of its
own; a batch is one write, flushed. A line that a kill has torn is no answer; its row is asked again, and so is
a row whose media could not be used. The folder goes when the predictions are whole: a later evaluation begins anew.

Cost: one small write a batch. Flushed means handed to the operating system: a kill loses nothing, a power cut may.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from data.schema import UserError
from eval.benchmarks.base import Row

FORMAT = 1
Answers = dict[int, tuple[str, str | None]]  # index of a row -> prediction, error


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def rows_digest(rows: Iterable[Row]) -> str:
    """sha256 over what is asked and what is true, row by row."""
    digest = hashlib.sha256()
    for row in rows:
        messages = row.sample.messages if row.sample else ()
        digest.update(repr((row.index, row.id, row.answer, row.error, messages)).encode(errors="backslashreplace"))
    return digest.hexdigest()


class Journal:
    """The answers of one benchmark under one set of settings."""

    def __init__(self, predictions: Path, stem: str, settings: Mapping[str, Any]) -> None:
        self.settings = json.loads(json.dumps(settings, default=str))
        self.stem, self.predictions = stem, predictions
        self.folder = predictions / f"{stem}.journal-{digest_of(self.settings)[:12]}"
        self._file: IO[str] | None = None

    # ---- write -------------------------------------------------------------------------------------------------------

    def add(self, rows: Sequence[Row], rank: int = 0) -> None:
        """Append the answers of a batch; the process's file is made at the first."""
        if self._file is None:
            self._file = self._new_file(rank)
        lines = [{"index": row.index, "prediction": row.prediction, "error": row.error} for row in rows]
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()

    def _new_file(self, rank: int) -> IO[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            try:
                file = open(self.folder / f"{rank}-{number}.jsonl", "x", encoding="ascii")  # noqa: SIM115
            except FileExistsError:
                number += 1
                continue
            file.write(json.dumps({"journal": FORMAT, "settings": self.settings}) + "\n")
            file.flush()
            return file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- read --------------------------------------------------------------------------------------------------------

    def read(self) -> Answers:
        """The answers of all processes so far; an answer goes before a row's error of an earlier attempt."""
        found: Answers = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            header, lines = _lines(path)
            if header == self.settings:
                for line in lines:
                    answer = (line["prediction"], line.get("error"))
                    if answer[1] is None or line["index"] not in found:
                        found[line["index"]] = answer
        return found

    def others(self) -> list[str]:
        """One line for each journal of this benchmark and control under other settings; they are left alone."""
        notes = []
        for folder in sorted(self.predictions.glob(f"{self.stem}.journal-*")):
            if folder == self.folder:
                continue
            read = [_lines(path) for path in sorted(folder.glob("*.jsonl"))]
            header: dict[str, Any] = next((header for header, _ in read if header), {})
            changed = [name for name in self.settings if header.get(name) != self.settings[name]]
            count = sum(len(lines) for _, lines in read)
            notes.append(
                f"note: {folder} holds {count} answers given under other settings ({', '.join(changed) or 'unknown'}); "
                "they are not used. The same settings go on from it; or delete it"
            )
        return notes


def fill(rows: Sequence[Row], answers: Answers) -> None:
    """Put journalled answers into their rows."""
    for row in rows:
        if row.index in answers:
            row.prediction, row.error = answers[row.index]


def check_whole(rows: Sequence[Row], answers: Answers) -> None:
    """Raise UserError where some row that could be asked has no answer (another process removed the journal)."""
    open_rows = [row.index for row in rows if row.sample is not None and row.error is None]
    missing = [index for index in open_rows if index not in answers]
    if missing:
        raise UserError(
            f"{len(missing)} rows have no answer in the journal (the first: row {missing[0]}): another evaluation of "
            "the same run and settings has removed it; let one of them finish, then start the same command again"
        )


def _lines(path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Settings of a journal file (None where they cannot be read) and its whole lines."""
    records = list(_records(path))
    if not records or records[0].get("journal") != FORMAT:
        return None, []
    return records[0].get("settings"), [record for record in records[1:] if _is_answer(record)]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="ascii", errors="replace") as file:
        for text in file:
            try:
                record = json.loads(text) if text.endswith("\n") else None  # torn: without its end
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _is_answer(record: dict[str, Any]) -> bool:
    return (
        type(record.get("index")) is int
        and isinstance(record.get("prediction"), str)
        and isinstance(record.get("error", ""), str | None)
    )
