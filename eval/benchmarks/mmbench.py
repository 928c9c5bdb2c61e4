"""MMBench (Liu et al. 2023), with and without CircularEval.

File, as published (github.com/open-compass/MMBench): a TSV such as mmbench_dev_20230712.tsv or MMBench_DEV_EN.tsv with
the columns index, question, hint, A, B, C, D, answer, category, image, l2-category, ...; the picture stands in the cell
as base64, or as the index of the row that holds it. Pictures are written when the file is loaded, where they are not
there yet or others, to the folder FILE.images/ beside it (FILE without its ending): the media folder is the file's own.

Predictions: rows {"index", "image_path", "question", "answer", "output": [text]}. The score is plain accuracy over all
rows, letters as in choices.py. CircularEval asks each question as often as it has options, the options moved on by one
each time; a question is right when all its passes are (one that a file lacks is wrong). As the publishers have it, pass k
of question i bears the index i + 1000000 k. Load with the option circular=true to ask all passes (a TSV that holds them
is taken as it is); scoring finds rows by their index, makes the passes where a row belongs to a later one, and then gives
`circular` (share of questions right in all passes) and `vanilla` (of those right in the first pass) beside the accuracy
of all rows.

lmms-eval 0.7.3 (task mmbench_en_dev_static; `circular` where its rows have passes) agrees but for a small letter alone,
which it does not read, and the A of `A cat`, which it takes for the letter. Its task mmbench_en_dev asks GPT about what
it cannot read, and draws a letter where GPT does not answer.
"""

from __future__ import annotations

import base64
import binascii
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from data.schema import BadSample, Media, Sample
from data.sources.rows import Rows, text_of
from eval.benchmarks.base import Row, share
from eval.benchmarks.choices import LETTERS, true_letter
from eval.benchmarks.fields import Fields
from eval.benchmarks.multiple_choice import MultipleChoice
from eval.benchmarks.questions import read_table
from mokamm.training.disk import replacing

PASS = 1_000_000  # what one pass of CircularEval adds to a question's index
OPTIONS = "ABCDE"


class MmBench(MultipleChoice):
    name = "mmbench"
    categories: ClassVar[tuple[str, ...]] = ("category",)
    home = (
        "get a TSV with answers, such as mmbench_dev_20230712.tsv, from github.com/open-compass/MMBench and name it as "
        "the path; its folder is the media folder"
    )

    truth_options: ClassVar[dict[str, Any]] = {"pictures": False}
    index_is_id = True

    def open(self, path: Path, media_dir: Path | None = None, *, circular: bool = False, **options: Any) -> Rows:
        records = read_table(path, "\t", ("index", "question", "A", "B", "answer", "image"))
        if circular and not any(_number(record.get("index")) >= PASS for record in records):
            records = [moved for record in records for moved in _passes(record)]
        return Rows(path, records, partial(self.prompt, folder=path.parent, stem=path.stem, **options))

    def prompt(
        self, record: Any, index: int, folder: Path = Path(), stem: str = "mmbench", *, pictures: bool = True
    ) -> Sample:
        choices = _choices(record)
        hint = (record.get("hint") or "").strip()
        question = text_of(record, "question")
        question = question if hint in ("", "nan") else f"{hint}\n{question}"
        image = _picture(record, folder, stem, pictures)
        meta = {key: record[key] for key in ("category", "l2-category") if record.get(key)}
        meta |= {"index": int(record["index"]), "image_path": image}
        media = [Media("image", image, "vision")]
        return self.asked(str(record["index"]), question, choices, text_of(record, "answer"), media, index, meta)

    def options_for(self, found: Sequence[Fields]) -> dict[str, Any]:
        """All passes of CircularEval where a row belongs to a later one."""
        numbers = [_number(fields.id or (None if fields.own else fields.index)) for fields in found]
        return {**self.truth_options, "circular": max(numbers, default=0) >= PASS}

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return super().details(rows) | self._circular(rows, self.reading)

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return super().official_details(rows) | self._circular(rows, self.official_reading)

    def _circular(self, rows: Sequence[Row], reading: Callable[[Row], Any]) -> dict[str, Any]:
        """circular and vanilla accuracy by question; nothing where no row is a later pass.

        A pass without a row is a wrong one: a question has as many as it has options, where these are known.
        """
        passes: dict[int, dict[int, bool]] = defaultdict(dict)
        wanted: dict[int, int] = defaultdict(lambda: 2)
        for row in rows:
            index = row.meta.get("index")
            question, number = -1 - row.index, 0  # a row that could not be read is a question of its own
            if isinstance(index, int) and index >= 0:
                question, number = index % PASS, index // PASS
            passes[question][number] = self.right(row, reading)
            wanted[question] = max(wanted[question], number + 1, len(self.choices_of(row)))
        if not any(number for found in passes.values() for number in found):
            return {}
        count = len(passes)
        whole = [all(found.get(number, False) for number in range(wanted[name])) for name, found in passes.items()]
        return {
            "circular": share(sum(whole), count),
            "vanilla": share(sum(question.get(0, False) for question in passes.values()), count),
            "questions": count,
        }


def _number(value: Any) -> int:
    """An index as the TSV or a row has it; -1 where it is none."""
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 19 else -1


def _choices(record: dict[str, Any]) -> list[str]:
    """The row's options, as many as it has; an empty cell, or `nan`, is none."""
    cells = [(record.get(letter) or "").strip() for letter in OPTIONS]
    count = next((k for k, cell in enumerate(cells) if cell in ("", "nan")), len(cells))
    if count < 2:
        raise BadSample("the row has fewer than two options")
    return cells[:count]


def _passes(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The passes of CircularEval: in pass k option j is the first pass's option j + k."""
    try:
        choices, index = _choices(record), int(str(record.get("index")))
    except (BadSample, ValueError):
        return [record]  # stays once; prompt tells what is wrong with it
    letter = true_letter(record.get("answer") or "", choices)
    if letter is None or letter not in LETTERS[: len(choices)]:
        return [record]
    passes = []
    for k in range(len(choices)):
        moved = dict(zip(OPTIONS, choices[k:] + choices[:k], strict=False))
        answer = LETTERS[(LETTERS.index(letter) - k) % len(choices)]
        passes.append({**record, **moved, "answer": answer, "index": str(index + PASS * k)})
    return passes


def _picture(record: dict[str, Any], folder: Path, stem: str, write: bool) -> str:
    """The picture's path in `folder`; if told to, written there from the cell's base64 where it is not yet, or another."""
    try:
        index = int(str(record.get("index"))) % PASS  # that of the first pass
    except ValueError:
        raise BadSample(f"'index' must be a number, found {record.get('index')!r}") from None
    cell = (record.get("image") or "").strip()
    if cell.isdigit() and len(cell) < 12:  # the row that holds the picture
        return f"{stem}.images/{int(cell) % PASS}.jpg"
    path = folder / f"{stem}.images" / f"{index}.jpg"
    if write:
        try:
            content = base64.b64decode(cell, validate=True)
        except (binascii.Error, ValueError):
            raise BadSample(f"the picture of row {index} is not base64") from None
        if not content:
            raise BadSample(f"row {index} has no picture")
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as beside:
                beside.write_bytes(content)
    return f"{stem}.images/{index}.jpg"
