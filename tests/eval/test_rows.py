"""From annotation files to answered rows: every row stays, in its place, whatever is wrong with it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from data.schema import BadSample, Sample, UserError
from eval.benchmarks import BENCHMARKS, Row
from eval.generation import Ask, answer_batches, by_tokens, make_batches, remaining


def write_avqa(path: Path, count: int = 7) -> Path:
    rows = [
        {
            "video_id": f"{i // 2:08d}",
            "question_id": i,
            "type": '["Audio-Visual", "Counting"]',
            "question_content": "How many <Object> are sounding" + " now" * (i % 3) + "?",
            "templ_values": '["bells"]',
            "anser": "two" if i % 2 else "three",
        }
        for i in range(count)
    ]
    del rows[3]["anser"]
    path.write_text(json.dumps(rows))
    return path


def test_avqa_rows(tmp_path: Path) -> None:
    rows = BENCHMARKS["miniworld_avqa"].load(write_avqa(tmp_path / "avqa.json"))
    assert len(rows) == 7
    sample = rows[1].sample
    assert sample is not None
    assert [media.path for media in sample.media] == ["videos/00000000.mp4", "audio/00000000.wav"]
    assert sample.prompt[-1].text == "How many bells are sounding now?"
    assert (rows[1].answer, rows[1].unit, rows[1].error) == ("two", "00000000", None)
    assert rows[1].meta["question_type"] == ["Audio-Visual", "Counting"]
    assert rows[3].sample is None
    assert "row 3" in (rows[3].error or "")


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = write_avqa(tmp_path / "avqa.json")
    assert [row.index for row in BENCHMARKS["miniworld_avqa"].load(path, limit=2)] == [0, 1]
    assert len(BENCHMARKS["miniworld_avqa"].load(path, limit=100)) == 7


def test_event_rows(tmp_path: Path) -> None:
    path = tmp_path / "events.txt"
    path.write_text("Category&VideoID&Quality&StartTime&EndTime\nred bell&c1&good&2&5\nred bell&c2&good&7\n")
    benchmark = BENCHMARKS["miniworld_events"]
    rows = benchmark.load(path)
    assert [row.error is None for row in rows] == [True, False]
    rows[0].prediction = rows[0].answer
    assert benchmark.points(rows[0]) == (10, 10)
    assert benchmark.score(rows)["score"] == 0.5
    assert rows[0].sample is not None
    assert [media.path for media in rows[0].sample.media] == ["videos/c1.mp4", "audio/c1.wav"]


@pytest.mark.parametrize("name", ["miniworld_spoken", "miniworld_transcription", "miniworld_images"])
def test_message_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / "rows.jsonl"
    media = {"type": "image", "path": "images/1.png"}
    good = {
        "id": "a",
        "messages": [
            {"role": "user", "content": [media, {"type": "text", "text": "A bell?", "question": True}]},
            {"role": "assistant", "content": "yes"},
        ],
    }
    path.write_text(json.dumps(good) + "\n{broken\n")
    rows = BENCHMARKS[name].load(path)
    assert [row.id for row in rows] == ["a", "1"]
    assert [row.error is None for row in rows] == [True, False]
    assert (rows[0].unit, rows[0].answer) == ("images/1.png", "yes")


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"avqa\.json"):
        BENCHMARKS["miniworld_avqa"].load(tmp_path / "avqa.json")


# ---- asking ----------------------------------------------------------------------------------------------------------


def letters(sample: Sample) -> int:
    return len(sample.prompt[-1].text)


def answer_rows(ask: Ask, rows: list[Row], batch_size: int, label: str | None = None) -> list[list[int]]:
    """In one process; the indices of the rows as they were kept."""
    kept: list[list[int]] = []
    batches = make_batches(rows, batch_size, letters)
    answer_batches(ask, batches, lambda batch: kept.append([row.index for row in batch]), label)
    return kept


def echo(samples: list[Sample]) -> list[str]:
    """Answers with the row's own id; clip 2 cannot be opened, which breaks every batch that it is in."""
    for sample in samples:
        if sample.meta["video_id"] == "00000002":
            raise BadSample("videos/00000002.mp4: the file is cut off")
    return [sample.id for sample in samples]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
def test_every_row_gets_its_own_answer(tmp_path: Path, batch_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = BENCHMARKS["miniworld_avqa"].load(write_avqa(tmp_path / "avqa.json", count=25))
    kept = answer_rows(echo, rows, batch_size, "avqa")
    assert sorted(index for batch in kept for index in batch) == [i for i in range(25) if i != 3]  # bad ones too, once
    for i, row in enumerate(rows):
        assert row.index == i
        if i == 3:
            assert row.prediction == ""
        elif row.unit == "00000002":
            assert (row.prediction, row.error) == ("", "videos/00000002.mp4: the file is cut off")
        else:
            assert (row.prediction, row.error) == (f"{row.unit}-{i}", None)
    metrics = BENCHMARKS["miniworld_avqa"].score(rows)
    assert (metrics["rows"], metrics["bad"]) == (25, 3)
    output = capsys.readouterr()
    assert output.out == ""
    assert "avqa: 24/24 rows" in output.err


def test_batches_hold_rows_of_like_length_longest_first(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def note(samples: list[Sample]) -> list[str]:
        seen.append([len(sample.prompt[-1].text) for sample in samples])
        return [""] * len(samples)

    rows: list[Row] = BENCHMARKS["miniworld_avqa"].load(write_avqa(tmp_path / "avqa.json", count=13))
    answer_rows(note, rows, 4)
    flat = [length for batch in seen for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert [len(batch) for batch in seen] == [4, 4, 4]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
def test_ranks_share_the_same_batches_and_leave_out_what_is_answered(tmp_path: Path, world: int) -> None:
    rows: list[Row] = BENCHMARKS["miniworld_avqa"].load(write_avqa(tmp_path / "avqa.json", count=25))
    batches = make_batches(rows, 4, letters)
    answered = {row.index for row in batches[1]} | {batches[2][0].index}  # a batch, and one row of the next
    shares = [remaining(batches, answered, rank, world) for rank in range(world)]
    assert all(share for share in shares[: len(batches) - 1])
    assert all(not share for share in shares[len(batches) - 1 :])  # ranks without rows
    asked = [batch for share in shares for batch in share]
    assert sorted(row.index for batch in asked for row in batch) == sorted(set(range(25)) - {3} - answered)
    whole = [batch for batch in batches if not answered & {row.index for row in batch}]
    assert all(batch in asked for batch in whole)


def test_rows_of_one_clip_stand_together_within_a_few_tokens(tmp_path: Path) -> None:
    rows = BENCHMARKS["miniworld_avqa"].load(write_avqa(tmp_path / "avqa.json", count=24))
    batches = make_batches(rows, 4, by_tokens(letters))
    steps = [-(-letters(row.sample) // 8) for batch in batches for row in batch if row.sample]
    assert steps == sorted(steps, reverse=True)
    clips = [row.unit for batch in batches for row in batch]
    changes = sum(a != b or c != d for (a, b), (c, d) in zip(pairwise(clips), pairwise(steps), strict=True))
    assert changes == len(set(zip(clips, steps, strict=True))) - 1


def test_an_unexpected_error_is_not_hidden(tmp_path: Path) -> None:
    def broken(samples: list[Sample]) -> list[str]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        answer_rows(broken, BENCHMARKS["miniworld_avqa"].load(write_avqa(tmp_path / "avqa.json")), batch_size=2)
