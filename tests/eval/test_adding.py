"""Adding a benchmark is one class and one registry line, shown here: asked, read and scored like the others."""

from __future__ import annotations

import json

import pytest

from data.schema import BadSample, Media
from data.sources.rows import text_of
from eval.benchmarks import BENCHMARKS
from eval.benchmarks.base import RightOrWrong, normalise
from eval.benchmarks.questions import ask, own_media, record_of
from eval.score import score


class Colours(RightOrWrong):
    """A whole benchmark: jsonl of {"image", "colour"}; the first colour that an answer names counts."""

    name = "colours"
    home = "write a jsonl file of your own"
    known = ("red", "green", "blue")

    def prompt(self, record, index):
        row = record_of(record)
        return ask(str(index), "Which colour?", text_of(row, "colour"), own_media(row), index=index, source=self.name)

    def parse(self, text):
        return next((word for word in normalise(text).split() if word in self.known), None)

    def truth_of(self, row):
        return self.parse(row.answer)


@pytest.fixture
def annotations(tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "colours", Colours())
    file = tmp_path / "colours.jsonl"
    lines = [{"image": f"{k}.png", "colour": colour} for k, colour in enumerate(["red", "blue", "green", "red"])]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"image": "4.png"}]))
    return file


def test_its_rows_are_asked(annotations) -> None:
    rows = BENCHMARKS["colours"].load(annotations)
    assert [row.answer for row in rows] == ["red", "blue", "green", "red", ""]
    assert rows[1].sample.media == [Media("image", "1.png", "vision")]
    assert "'colour' is missing or empty" in rows[4].error
    with pytest.raises(BadSample, match="'colour' is missing or empty"):
        BENCHMARKS["colours"].open(annotations)[4]


def test_its_predictions_are_scored(annotations, tmp_path) -> None:
    said = ["Red, I think", "It is green.", "no idea", "A red one"]
    file = tmp_path / "predictions.jsonl"
    rows = zip(BENCHMARKS["colours"].load(annotations), said, strict=False)
    file.write_text(
        "".join(json.dumps({"id": row.id, "prediction": text, "answer": row.answer}) + "\n" for row, text in rows)
    )
    found = score("colours", file)
    assert (found["score"], found["rows"], found["unparsed"]) == (0.5, 4, 1)
    found = score("colours", file, annotations)
    assert (found["missing"], found["score"]) == (1, 0.4)  # a row that was never asked is wrong
