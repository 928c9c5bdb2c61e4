"""The journal of an evaluation: what is on disk after any kill is answers that count, under one set of settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.schema import Message, Sample, Text, UserError
from eval.benchmarks import Row
from eval.controls import Control
from eval.journal import Journal, check_whole, fill, rows_digest
from eval.run import keep, parse_arguments, settings_of_model
from mokamm.config import load_run_config

SETTINGS = {"weights": "abc", "max_new_tokens": 32, "options": {"circular": True}, "limit": None}
STRANGE = ["two", "", "да 二 \u202e\u0000\x1b[31m", "\ud800 half a pair", 'a"\\\n{"index": 3}\n', "x" * 1_000_000]


def rows_of(texts: list[str]) -> list[Row]:
    return [Row(id=str(i), index=i, prediction=text) for i, text in enumerate(texts)]


def journal(folder: Path, **changes: Any) -> Journal:
    return Journal(folder, "pope", {**SETTINGS, **changes})


def test_strange_answers_come_back_as_they_were(tmp_path: Path) -> None:
    first = journal(tmp_path)
    rows = rows_of(STRANGE)
    rows[1].error = "videos/3.mp4: the file is cut off"
    first.add(rows[:3])
    first.add(rows[3:])
    assert journal(tmp_path).read() == {row.index: (row.prediction, row.error) for row in rows}  # before any close
    empty = rows_of([""] * len(STRANGE))
    fill(empty, journal(tmp_path).read())
    assert empty == rows
    first.remove()
    assert list(tmp_path.iterdir()) == []
    assert journal(tmp_path).read() == {}


def test_cut_at_any_byte_only_whole_lines_count(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.add(rows_of(["two", "да", "a\nb"]))
    first.close()
    (path,) = first.folder.iterdir()
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = max(sum(end <= size for end in ends) - 1, 0)  # the header is a line, too
        assert sorted(journal(tmp_path).read()) == list(range(whole))
    path.write_bytes(content[: ends[1] + 4])
    resumed = journal(tmp_path)
    resumed.add(rows_of(["two", "DA", "c"])[1:])  # in a file of its own, so that the torn end swallows nothing
    assert journal(tmp_path).read() == {0: ("two", None), 1: ("DA", None), 2: ("c", None)}


@pytest.mark.parametrize(
    "junk", [b"\xff\x00\xfe\n", b"[]\n", b"{}\n", b'{"index": "1", "prediction": "x"}\n', b"\0" * 50]
)
def test_junk_is_no_answer(tmp_path: Path, junk: bytes) -> None:
    first = journal(tmp_path)
    first.add(rows_of(["two"]))
    first.close()
    (path,) = first.folder.iterdir()
    path.write_bytes(path.read_bytes() + junk)
    (first.folder / "1-0.jsonl").write_bytes(junk)
    assert first.read() == {0: ("two", None)}


def test_two_processes_never_write_into_one_file(tmp_path: Path) -> None:
    one, other = journal(tmp_path), journal(tmp_path)
    one.add(rows_of(["a"]))
    other.add(rows_of(["-", "b"])[1:])
    one.add(rows_of(["-", "-", "c"])[2:])
    assert journal(tmp_path).read() == {0: ("a", None), 1: ("b", None), 2: ("c", None)}
    assert len(list(one.folder.iterdir())) == 2


def test_answers_of_other_settings_are_left_alone_and_told(tmp_path: Path) -> None:
    old = journal(tmp_path, max_new_tokens=64)
    old.add(rows_of(["a", "b"]))
    Journal(tmp_path, "pope.blind", SETTINGS).add(rows_of(["c"]))
    new = journal(tmp_path)
    assert new.read() == {}
    (note,) = new.others()
    assert "2 answers" in note
    assert "(max_new_tokens)" in note
    assert old.others() == []
    (path,) = old.folder.iterdir()
    path.rename(new.folder.with_name("x"))
    new.folder.mkdir()
    (tmp_path / "x").rename(new.folder / "0-0.jsonl")  # moved by hand: the header tells
    assert new.read() == {}


def test_rows_are_known_by_their_content() -> None:
    def row(question: str = "Red?", answer: str = "yes") -> Row:
        sample = Sample("a", (Message("user", (Text(question),)), Message("assistant", (Text(answer),))))
        return Row(id="a", index=0, answer=answer, sample=sample)

    assert rows_digest([row()]) == rows_digest([row()])
    assert len({rows_digest(rows) for rows in ([row()], [row("Blue?")], [row(answer="no")], [row(), row()], [])}) == 5


def test_a_journal_that_went_away_is_one_message() -> None:
    sample = Sample("a", (Message("user", (Text("?"),)),))
    rows = [Row(id="0", index=0, error="bad"), Row(id="1", index=1, sample=sample)]
    check_whole(rows, {1: ("x", None)})
    with pytest.raises(UserError, match="row 1"):
        check_whole(rows, {})


def test_a_line_is_plain_json(tmp_path: Path) -> None:
    first = journal(tmp_path)
    first.add(rows_of(["да"]), rank=3)
    header, line = ((first.folder / "3-0.jsonl").read_text()).splitlines()
    assert json.loads(header) == {"journal": 1, "settings": SETTINGS}
    assert json.loads(line) == {"index": 0, "prediction": "да", "error": None}


def test_an_answer_goes_before_the_error_of_an_earlier_attempt(tmp_path: Path) -> None:
    first = journal(tmp_path)
    bad = Row(id="0", index=0, error="not found")
    first.add([bad])
    assert first.read() == {0: ("", "not found")}
    second = journal(tmp_path)
    second.add(rows_of(["two"]))
    second.add([bad])
    assert journal(tmp_path).read() == {0: ("two", None)}


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    full = journal(tmp_path)
    full._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(UserError, match=r"No space left on device.*goes on from the answers that are kept"):
        keep(full, rows_of(["two"]), 0)
    full._file = None


def test_the_control_base_is_known_by_the_weights_of_stage_1(small_run: Path, tmp_path: Path) -> None:
    config = load_run_config(small_run)
    stage_1 = shutil.copytree(config.training.init_folders[0], tmp_path / "stage1")
    run = shutil.copytree(small_run, tmp_path / "run")
    config.training.init_from = str(stage_1)
    args = parse_arguments(["all", str(run)])

    def weights(control: str) -> str:
        return settings_of_model(args, config, Control(control))["weights"]

    plain, base = weights(""), weights("base")
    (run / "final" / "projectors.safetensors").write_bytes(b"others")
    assert weights("base") == base
    assert weights("") != plain
    (stage_1 / "projectors.safetensors").write_bytes(b"others")
    assert weights("base") != base
