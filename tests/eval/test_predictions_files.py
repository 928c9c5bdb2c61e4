"""eval/score.py on files as they come: padded, cut, mixed up, strange; and its paired test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources.ave import format_event
from eval.benchmarks import BENCHMARKS, find_benchmark
from eval.benchmarks.base import Row
from eval.score import main, score

ROOT = Path(__file__).resolve().parents[2]


def pope(i: int, output: str = "Yes", answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {
        "rank": 0,
        "index": i,
        "image_path": f"{i}.jpg",
        "question": f"A {i}?",
        "answer": answer,
        "output": [output],
    } | more


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def counts(result: dict[str, Any]) -> tuple[int, ...]:
    return tuple(result[key] for key in ("rows", "parsed", "unparsed", "bad", "duplicates", "missing", "extra"))


# ---- repeated rows ---------------------------------------------------------------------------------------------------


def test_padding_is_counted_once_by_the_strict_rule(tmp_path: Path) -> None:
    rows = [pope(0), pope(1, "No"), pope(2), pope(0, "No", rank=1), pope(1, "No", rank=1)]
    result = score("pope", write(tmp_path / "p.jsonl", rows))
    assert counts(result) == (5, 3, 0, 0, 2, 0, 0)
    assert result["rules"]["strict"]["score"] == pytest.approx(2 / 3)  # the first of the repeated rows counts
    assert result["rules"]["official"]["score"] == pytest.approx(2 / 5)
    assert result["rules"]["official"]["rows"] == 5


def test_an_index_of_each_process_is_no_name(tmp_path: Path) -> None:
    """Ranks that number their own rows: rank 1's row 0 is another row, its row 1 the padding."""
    rows = [pope(0), pope(2, index=1), pope(1, rank=1, index=0), pope(0, rank=1, index=1)]
    assert counts(score("pope", write(tmp_path / "p.jsonl", rows))) == (4, 3, 0, 0, 1, 0, 0)


def test_an_index_of_the_data_set_keeps_like_rows_apart(tmp_path: Path) -> None:
    """POPE's three files share their questions about what is there."""
    rows = [pope(0), pope(0, index=1), pope(0, index=2), pope(0, index=2)]
    assert counts(score("pope", write(tmp_path / "p.jsonl", rows))) == (4, 3, 0, 0, 1, 0, 0)


def test_rows_without_a_name_are_all_kept(tmp_path: Path) -> None:
    row = {"output": "two</s>", "question_type": ["Audio", "Counting"], "predict": "<answer> two </answer>"}
    path = write(tmp_path / "p.jsonl", [row, row, row])
    assert counts(score("music_avqa", path)) == (3, 3, 0, 0, 0, 0, 0)
    named = row | {"video_path": "1.mp4", "instruction": "How many?"}
    path = write(tmp_path / "p.jsonl", [named, named, named | {"instruction": "How many flutes?"}])
    assert counts(score("music_avqa", path)) == (3, 2, 0, 0, 1, 0, 0)


# ---- broken files ----------------------------------------------------------------------------------------------------


def test_broken_lines_and_foreign_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ave = {"output": "event:Bus start_time:0 end_time:4</s>", "video_path": "v.mp4", "predict": "<event> Bus </event>"}
    rows = [
        pope(0),
        '{"answer": "yes", "outp',
        "[1, 2]",
        "null",
        ave,
        {"answer": "yes", "image_path": "x"},
        pope(1, ""),
    ]
    path = write(tmp_path / "p.jsonl", rows)
    assert main(["pope", "--predictions", str(path), "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert counts(result) == (7, 1, 1, 5, 0, 0, 0)
    assert result["rules"]["strict"]["score"] == pytest.approx(1 / 7)
    assert result["rules"]["official"]["rows"] == 3  # the script would have stopped at the others
    assert len(result["problems"]) == 5
    assert "row 2: is not JSON" in output.err
    assert "neither yes nor no: 'event:Bus" in output.err


@pytest.mark.parametrize("text", ["", "\n\n", "not json", "[]", "{}", '{"output": null}', "[[[[" * 5000, "\x00\xff"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_file_is_a_crash(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(text.encode("latin-1"))
    result = score(name, path)
    assert result["rules"]["strict"]["score"] in (0.0, result["score"])
    assert result["parsed"] == 0
    assert any("no answer could be parsed" in problem for problem in result["problems"])


STRANGE = [
    "",
    " ",
    "نعم",
    "да",
    "\ud800",
    "\u2028",
    "0" * 5000,
    "yes" + "<answer>" * 300,
    "<event>" * 300,
    None,
    3,
    [],
    {},
]
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(STRANGE)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
fields = st.sampled_from(
    [
        "id", "index", "rank", "subtask", "image_path", "video_path", "question", "answer", "output", "predict", "meta",
        "prediction", "unit", "question_type", "choices", "references", "text", "category", "error", "language",
    ]
)  # fmt: skip


@given(st.sampled_from(sorted(BENCHMARKS)), st.lists(st.dictionaries(fields, json_values, max_size=8), max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_rows_are_counted(tmp_path_factory: pytest.TempPathFactory, name: str, rows: list[dict[str, Any]]) -> None:
    path = write(tmp_path_factory.mktemp("any") / "p.jsonl", rows)
    result = score(name, path, against=None)
    parts = ("parsed", "unparsed", "bad", "duplicates", "extra")
    assert result["rows"] == len(rows) == sum(result[key] for key in parts)
    json.dumps(result)


@pytest.mark.parametrize("name", ["ave", "music_avqa", "mmbench", "mme"])
def test_a_million_letters(tmp_path: Path, name: str) -> None:
    """Inputs on which a pattern that backtracks would take hours."""
    strange = [
        "<event>" * 150_000,
        "<range> " * 130_000,
        "<answer>" * 130_000,
        "(" * 10**6,
        "a " * 500_000,
        " " * 10**6,
    ]
    strange += ["answer is " * 100_000, "<event> Bus </event> <range> " + "1" * 10**6 + ",2 </range>", "А" * 10**6]
    truth = {"ave": "event:Bus start_time:0 end_time:4", "music_avqa": "two", "mme": "yes"}.get(name, "B")
    more = {"subtask": "count"} if name == "mme" else {}
    rows = [pope(i, text, truth, **more) for i, text in enumerate(strange)]
    if name in ("ave", "music_avqa"):
        keys = {"predict": "output", "output": "answer", "video_path": "image_path"}
        rows = [{new: row[old] for new, old in keys.items()} | {"question": "?"} for row in rows]
        rows = [row | {"predict": row["predict"][0]} for row in rows]
    result = score(name, write(tmp_path / "p.jsonl", rows))
    assert result["rows"] == len(strange) == result["parsed"] + result["unparsed"]
    assert result["unparsed"] >= 7


# ---- annotations -----------------------------------------------------------------------------------------------------


def test_missing_and_extra_rows(tmp_path: Path) -> None:
    lines = [{"question_id": i, "image": f"{i}.jpg", "text": f"A {i}?", "label": "yes"} for i in range(4)]
    annotations = write(tmp_path / "coco_pope_random.json", lines)
    rows = [pope(0, answer="no"), pope(1, image_path="val/1.jpg"), pope(9), "{broken", pope(1, rank=1, index=7)]
    result = score("pope", write(tmp_path / "p.jsonl", rows), annotations)
    assert counts(result) == (5, 2, 0, 1, 1, 2, 1)
    assert result["rules"]["strict"]["score"] == pytest.approx(2 / 4)  # the annotation's truth counts, not the row's
    assert result["rules"]["strict"]["rows"] == 4


def test_llava_answers_are_found_by_their_question(tmp_path: Path) -> None:
    lines = [{"question_id": i, "image": "1.jpg", "text": f"A {i}?", "label": "yes"} for i in range(3)]
    rows = [{"question_id": i, "prompt": f"A {i}?\nAnswer yes or no.", "text": "Yes"} for i in (2, 0)]
    result = score("pope", write(tmp_path / "p.jsonl", rows), write(tmp_path / "a.json", lines))
    assert counts(result) == (2, 2, 0, 0, 0, 1, 0)
    by_question = [
        {"image": "x/1.jpg", "prompt": f"A {i}?\nAnswer yes or no.", "output": ["yes"]} for i in (0, 1, 2, 2)
    ]
    result = score("pope", write(tmp_path / "p.jsonl", by_question), write(tmp_path / "a.json", lines))
    assert counts(result) == (4, 3, 0, 0, 1, 0, 0)


def test_rows_that_cannot_be_found_keep_their_own_truth(tmp_path: Path) -> None:
    question = {"video_id": "1", "question_id": 4, "type": '["Audio", "Counting"]', "question_content": "How many?"}
    annotations = tmp_path / "avqa-test.json"
    annotations.write_text(json.dumps([question | {"templ_values": "[]", "anser": "two"}]))
    row = {"output": "two</s>", "question_type": ["Audio", "Counting"], "predict": "<answer> two </answer>"}
    result = score("music_avqa", write(tmp_path / "p.jsonl", [row, row]), annotations)
    assert counts(result) == (2, 2, 0, 0, 0, 0, 0)
    assert "no row names its id or media" in result["problems"][0]
    named = row | {"question_id": 4, "video_path": "videos/1.mp4"}
    result = score("music_avqa", write(tmp_path / "p.jsonl", [named, named | {"question_id": 5}]), annotations)
    assert counts(result) == (2, 1, 0, 0, 0, 0, 1)


def test_own_files_give_the_score_of_the_run(tmp_path: Path) -> None:
    """What eval/run.py wrote, read again: the same figures, also against its annotations."""
    benchmark = BENCHMARKS["miniworld_events"]
    annotations = tmp_path / "events.txt"
    annotations.write_text("".join(f"bell&c{i}&good&{i}&{i + 3}\n" for i in range(5)) + "bell&c9&good&7\n")
    rows = benchmark.load(annotations)
    for i, row in enumerate(rows[:5]):
        row.prediction = format_event("bell", 0, 3) if i != 2 else "?"
    path = write(tmp_path / "p.jsonl", [benchmark.to_json(row) for row in rows])
    expected = benchmark.score(rows)
    for result in (score("miniworld_events", path), score("miniworld_events", path, annotations)):
        assert result["rules"] == expected["rules"]
        assert counts(result) == (6, 4, 1, 1, 0, 0, 0)


@pytest.mark.parametrize("name", ["music_avqa", "ave"])
def test_own_answers_need_no_tags(tmp_path: Path, name: str) -> None:
    answer = {"music_avqa": "two", "ave": format_event("Bus", 1, 4)}[name]
    rows = [Row(id=str(i), index=i, answer=answer, prediction=answer, unit=str(i)) for i in range(2)]
    result = score(name, write(tmp_path / "p.jsonl", [BENCHMARKS[name].to_json(row) for row in rows]))
    assert result["rules"]["strict"]["score"] == result["rules"]["official"]["score"] == 1.0


# ---- a paired test ---------------------------------------------------------------------------------------------------


def test_the_paired_test_by_hand(tmp_path: Path) -> None:
    """Three images with two questions each; by image this file is right 2, 2, 1 times, the other 0, 1, 1 times."""

    def file(name: str, right: list[int]) -> Path:
        rows = [pope(i, "Yes" if ok else "No", image_path=f"{i // 2}.jpg") for i, ok in enumerate(right)]
        return write(tmp_path / name, rows[::-1] if name == "b" else rows)

    one, other = file("a", [1, 1, 1, 1, 1, 0]), file("b", [0, 0, 1, 0, 1, 0])
    test = score("pope", one, against=other)["against"]
    assert (test["rows"], test["units"], test["rows_only_here"], test["rows_only_there"]) == (6, 3, 0, 0)
    assert test["score"] == pytest.approx(2 / 6)
    assert test["difference"] == pytest.approx(3 / 6)
    # differences of the images 2, 1, 0: of the four sign patterns of (2, 1), the sums 3, 1, -1, -3: two reach 3
    assert test["p_value"] == pytest.approx(1 / 2)
    low, high = test["interval"]
    assert (low, high) == (0.0, pytest.approx(1.0))


def test_the_paired_test_equals_a_loop_over_signs(tmp_path: Path) -> None:
    """MME: a sum of ratios, over eight images, all 256 sign patterns by hand."""
    generator = np.random.default_rng(5)
    files = []
    for name in ("a", "b"):
        rows = [
            pope(k, generator.choice(["Yes", "No"]), image_path=f"{s}/{k // 2}.jpg", subtask=s)
            for s, images in (("count", 5), ("OCR", 3))
            for k in range(2 * images)
        ]
        files.append((write(tmp_path / name, rows), rows))
    differences = []
    for s, images in (("count", 5), ("OCR", 3)):
        for image in range(images):
            earned = []
            for _, rows in files:
                right = [r["output"] == ["Yes"] for r in rows if r["image_path"] == f"{s}/{image}.jpg"]
                earned.append(100 * sum(right) / (2 * images) + 100 * all(right) / images)
            differences.append(earned[0] - earned[1])
    signs = np.array(np.meshgrid(*[[1, -1]] * 8)).reshape(8, -1)
    observed = abs(sum(differences))
    expected = np.mean(np.abs(np.array(differences) @ signs) >= observed - 1e-9)
    test = score("mme", files[0][0], against=files[1][0])["against"]
    assert test["difference"] == pytest.approx(sum(differences))
    assert test["p_value"] == pytest.approx(expected)
    assert test["units"] == 8


def test_only_rows_of_both_files_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a", [pope(0), pope(1), pope(2)])
    other = write(tmp_path / "b", [pope(1, "No"), pope(2), pope(3), pope(4)])
    test = score("pope", one, against=other)["against"]
    assert (test["rows"], test["rows_only_here"], test["rows_only_there"]) == (2, 1, 2)
    assert (test["score"], test["difference"]) == (0.5, 0.5)
    apart = write(tmp_path / "c", [pope(7)])
    assert main(["pope", "--predictions", str(one), "--against", str(apart)]) == 2
    assert "no row in common" in capsys.readouterr().err


def test_nameless_rows_are_paired_in_order(tmp_path: Path) -> None:
    def file(name: str, said: list[str], truths: list[str]) -> Path:
        rows = [{"output": f"{t}</s>", "predict": f"<answer> {p} </answer>"} for t, p in zip(truths, said, strict=True)]
        return write(tmp_path / name, rows)

    truths = ["two", "one", "yes"]
    test = score("avqa", file("a", truths, truths), against=file("b", ["two", "two", "no"], truths))["against"]
    assert (test["rows"], test["difference"]) == (3, pytest.approx(2 / 3))


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", ["pope", "asr"])
def test_the_script_is_one_json_object_and_loads_no_torch(tmp_path: Path, benchmark: str) -> None:
    spoken = {"audio_filepath": "a.wav", "text": "two dogs", "pred_text": "two dog"}
    path = write(tmp_path / "p.jsonl", [pope(0), pope(1, "\ud800 да")] if benchmark == "pope" else [spoken])
    code = "import sys; from eval.score import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, benchmark, "--predictions", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"benchmark", "rows", "parsed", "unparsed", "duplicates", "rules"} <= set(result)
    assert set(result["rules"]) == {"strict", "official"}
    command = [sys.executable, "-m", "mokamm.cli", "score", "popes", "--predictions", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'pope'" in done.stderr


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "a", [pope(0), pope(1)]), write(tmp_path / "b", [pope(0, "No"), pope(1)])
    assert main(["POPE", "--predictions", str(one), "--against", str(other)]) == 0
    out = " ".join(capsys.readouterr().out.split())  # a line breaks where the folder's name is long
    for word in ("strict", "official", "precision", "yes ratio", "p = 1", "2 parsed"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pope", "--predictions", "absent.jsonl"], "the predictions file cannot be read"),
        (["pope", "--predictions", "."], "the predictions file cannot be read"),
        (["pope", "--predictions", "p", "--annotations", "absent.json"], "get coco_pope_"),
        (["ave", "--predictions", "p", "--annotations", "absent.txt"], "AVE_Dataset.zip"),
        (["mmbench", "--predictions", "p", "--annotations", "."], "Is a directory"),
        (["audiocaps", "--predictions", "p", "--annotations", "."], "Is a directory"),
        (["mmbench", "--predictions", "p", "--annotations", "latin"], "is not UTF-8 text"),
        (["audiocaps", "--predictions", "p", "--annotations", "latin"], "is not UTF-8 text"),
        (["pope", "--predictions", "p", "--annotations", "."], "Is a directory"),
        (["pope", "--predictions", "p", "--annotations", "latin"], "is not UTF-8 text"),
    ],
)
def test_mistakes_end_in_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p", [pope(0)])
    (tmp_path / "latin").write_bytes("index\tcaf\xe9\n".encode("latin-1"))
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert (output.out, output.err.startswith("error: ")) == ("", True)
    assert message in output.err


def test_names_as_people_write_them() -> None:
    written = ("AVE", "MUSIC-AVQA", "MME", "MMBench", "POPE", "SEED-Bench", "seed", "MMAU", "AIR-Bench", "LibriSpeech")
    names = [find_benchmark(name).name for name in written]
    assert names[:2] == ["ave", "music_avqa"]
    assert names[5:] == ["seed_bench", "seed_bench", "mmau", "air_bench", "librispeech"]


# ---- annotations whose files have equal names ------------------------------------------------------------------------


def test_recordings_of_one_name_in_several_folders_are_told_apart(tmp_path: Path) -> None:
    rows = [{"audio_filepath": f"spk{k}/001.wav", "text": word} for k, word in enumerate(("one", "two", "three"))]
    manifest = write(tmp_path / "manifest.jsonl", rows)
    said = [{**rows[k], "pred_text": rows[k]["text"], "audio_filepath": f"/data/spk{k}/001.wav"} for k in (2, 0, 1)]
    result = score("asr", write(tmp_path / "p.jsonl", said), annotations=manifest)
    assert (result["score"], result["missing"], result["extra"]) == (0.0, 0, 0)


def ave(video: str, name: str, start: int, end: int) -> dict[str, Any]:
    return {
        "instruction": "?", "video_path": f"AVE/{video}.mp4",
        "output": f"event:{name} start_time:{start} end_time:{end}</s>",
        "predict": f"<event> {name} </event> <range> {start},{end - 1} </range>",
    }  # fmt: skip


def test_two_events_of_one_clip_go_by_their_truth_and_a_repeated_row_is_a_duplicate(tmp_path: Path) -> None:
    listed = tmp_path / "testSet.txt"
    listed.write_text("Bark&one&good&0&4\nCat&one&good&5&9\n")
    second = ave("one", "Cat", 5, 9)
    result = score("ave", write(tmp_path / "p.jsonl", [second, second, ave("one", "Bark", 0, 4)]), annotations=listed)
    assert (result["score"], result["duplicates"], result["missing"]) == (1.0, 1, 0)


def test_every_clip_of_the_test_list_counts_and_other_splits_are_told(tmp_path: Path) -> None:
    lines = "".join(f"Bark&clip{k}&good&0&10\n" for k in range(10))
    predictions = write(tmp_path / "p.jsonl", [ave(f"clip{k}", "Bark", 0, 10) for k in range(4)])
    for name in ("testSet.txt", "Annotations.txt"):
        (tmp_path / name).write_text(lines)
    test = score("ave", predictions, annotations=tmp_path / "testSet.txt")
    assert (test["missing"], test["score"]) == (6, pytest.approx(0.4))
    whole = score("ave", predictions, annotations=tmp_path / "Annotations.txt")
    assert (whole["missing"], whole["score"]) == (0, 1.0)
    assert "6 annotations have no row: taken for other splits" in whole["problems"][0]


def test_a_question_without_its_options_finds_its_annotation(tmp_path: Path) -> None:
    rows = [
        {"question": f"What is {k}?", "choices": ["cat", "dog"], "answer": "B", "image": "one.png"}
        for k in ("this", "that")
    ]
    said = [{"image_path": "one.png", "question": row["question"], "answer": "B", "output": ["B"]} for row in rows]
    own = write(tmp_path / "own.jsonl", rows)
    result = score("multiple_choice", write(tmp_path / "p.jsonl", said), annotations=own)
    assert (result["score"], result["missing"], result["extra"]) == (1.0, 0, 0)


def test_a_true_answer_in_words_is_that_of_an_annotation_in_letters(tmp_path: Path) -> None:
    annotated = {"id": "1", "question": "What?", "choices": ["cat", "dog"], "answer": "B"}
    own = write(tmp_path / "own.jsonl", [annotated])
    for answer, told in (("Dog.", 0), ("cat", 1)):
        row = {"id": "1", "question": "What?", "answer": answer, "output": ["B"]}
        result = score("multiple_choice", write(tmp_path / "p.jsonl", [row]), annotations=own)
        assert (result["score"], len(result["problems"])) == (1.0, told)


# ---- rows that belong to another file --------------------------------------------------------------------------------


def mmbench_table(path: Path, passes: bool = False) -> Path:
    """Two questions of one picture; `passes`: the file itself holds what CircularEval asks."""
    lines = [[7, "Which?", "cat", "dog", "cow", "C", "eA=="], [8, "What?", "one", "two", "", "A", "7"]]
    if passes:
        lines.append([1000008, "What?", "two", "one", "", "B", "7"])
    header = ["index", "question", "A", "B", "C", "answer", "image"]
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in [header, *lines]))
    return path


@pytest.mark.parametrize("own", [False, True])
def test_circular_rows_are_set_beside_their_own_pass(tmp_path: Path, own: bool) -> None:
    """A model that always says A: right in one pass of each question."""
    table, mmbench = mmbench_table(tmp_path / "t.tsv"), BENCHMARKS["mmbench"]
    rows = []
    for row in mmbench.load(table, options={"circular": True}):
        row.prediction = "A"
        published = {"index": row.meta["index"], "image_path": "7.jpg", "question": row.meta["asked"]}
        rows.append(mmbench.to_json(row) if own else published | {"answer": row.answer, "output": ["A"]})
    predictions = write(tmp_path / "p.jsonl", rows[::-1])
    for truths in (None, table):
        strict = score("mmbench", predictions, truths)["rules"]["strict"]
        assert strict["score"] == pytest.approx(2 / 5)
        assert (strict["circular"], strict["vanilla"], strict["questions"]) == (0.0, 0.5, 2)
    assert score("mmbench", predictions, table)["problems"] == []
    plain = score("mmbench", write(tmp_path / "q.jsonl", [rows[0], rows[3]]), table)
    assert (plain["score"], plain["missing"]) == (0.5, 0)
    assert "circular" not in plain["rules"]["strict"]


def test_a_table_that_holds_the_passes_is_taken_as_it_is(tmp_path: Path) -> None:
    table = mmbench_table(tmp_path / "t.tsv", passes=True)
    rows = BENCHMARKS["mmbench"].load(table, options={"circular": True, "pictures": False})
    assert [row.meta["index"] for row in rows] == [7, 8, 1000008]


def pope_file(tmp_path: Path, name: str, things: list[str]) -> tuple[Path, Path]:
    """One of POPE's files, the same images and numbers in each, and eval/run.py's predictions for it."""
    lines = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"Is there a {thing}?", "label": "no" if i % 2 else "yes"}
        for i, thing in enumerate(things, 1)
    ]
    annotations, pope = write(tmp_path / f"{name}.json", lines), BENCHMARKS["pope"]
    rows = pope.load(annotations)
    for row in rows:
        row.prediction = "yes"
    return annotations, write(tmp_path / f"{name}.jsonl", [pope.to_json(row) for row in rows])


def test_other_questions_under_the_same_ids_are_told_and_not_compared(tmp_path: Path) -> None:
    _, random = pope_file(tmp_path, "random", ["cat", "dog", "cow", "car"])
    popular, other = pope_file(tmp_path, "popular", ["bus", "dog", "bed", "car"])
    result = score("pope", random, against=other)
    against = result["against"]
    assert (against["rows"], against["rows_only_here"], against["rows_only_there"]) == (2, 2, 2)
    assert result["problems"] == [
        "2 rows have one id in both files, but another medium, question or true answer, and are not compared: 1, 3"
    ]
    assert score("pope", random, popular)["problems"] == [
        "2 rows have another question than their annotation, whose own counts: row 1, row 3"
    ]
    published = [
        {"question_id": 1, "image_path": "9.jpg", "question": "Is there a cat?", "answer": "no", "output": "no"}
    ]
    assert [problem[:20] for problem in score("pope", write(tmp_path / "p", published), popular)["problems"]][:3] == [
        "3 rows are missing: ", "1 rows have another ", "1 rows have another ",
    ]  # fmt: skip
    _, apart = pope_file(tmp_path, "apart", ["bus", "bus", "bed", "bed"])
    code = main(["pope", "--predictions", str(random), "--against", str(apart)])
    assert code == 2


def test_rows_are_the_same_wherever_their_media_lay_and_where_neither_can_be_used(tmp_path: Path) -> None:
    _, here = pope_file(tmp_path, "here", ["cat", "dog", "cow"])
    rows = [json.loads(line) for line in here.read_text().splitlines()]
    rows[2]["error"] = "BadSample: broken"
    here.write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        row["unit"] = f"/data/{row['unit']}"
    there = write(tmp_path / "there.jsonl", rows)
    against = score("pope", here, against=there)["against"]
    assert (against["rows"], against["rows_only_here"], against["rows_only_there"]) == (3, 0, 0)


def test_three_files_in_one_are_told_apart_and_repeated_rows_named(tmp_path: Path) -> None:
    files = [pope_file(tmp_path, name, things)[1] for name, things in (("a", ["cat", "dog"]), ("b", ["cat", "bus"]))]
    whole = write(tmp_path / "p.jsonl", [json.loads(line) for file in files for line in file.read_text().splitlines()])
    result = score("pope", whole)
    assert counts(result) == (4, 3, 0, 0, 1, 0, 0)
    assert result["problems"] == ["1 rows stand in the file again and do not count: row 3"]


def test_problems_name_the_first_rows_of_each_kind(tmp_path: Path) -> None:
    annotations, _ = pope_file(tmp_path, "a", [str(i) for i in range(5)])
    rows = [pope(9), "{broken", *([pope(1, image_path="5.jpg", question="Is there a 4?")] * 2)]
    problems = score("pope", write(tmp_path / "p.jsonl", rows), annotations)["problems"]
    assert "4 rows are missing: 1, 2, 3, ..." in problems
    assert {"1 rows are extra: row 1", "1 rows are repeated: row 4", "1 rows are not readable: row 2"} <= set(problems)


def test_aves_own_rows_are_found_by_their_clip_in_another_list(tmp_path: Path) -> None:
    """Ids count the lines of the file that was asked."""
    test, whole = tmp_path / "testSet.txt", tmp_path / "Annotations.txt"
    test.write_text("Bark&one&good&0&4\nCat&two&good&5&9\n")
    whole.write_text("Bus&three&good&0&4\nCat&two&good&5&9\nTruck&four&good&0&9\nBark&one&good&0&4\n")
    ave_ = BENCHMARKS["ave"]
    rows = ave_.load(test)
    for row in rows:
        row.prediction = row.answer
    predictions = write(tmp_path / "p.jsonl", [ave_.to_json(row) for row in [*rows, rows[0]]])
    result = score("ave", predictions, whole)
    assert (result["score"], result["extra"], result["duplicates"]) == (1.0, 0, 1)


def test_rows_that_one_file_lacks_are_not_compared_with_annotations_either(tmp_path: Path) -> None:
    annotations, _ = pope_file(tmp_path, "a", ["cat", "dog", "cow", "car"])
    rows = [{"question_id": i, "image": f"{i}.jpg", "output": ["yes"]} for i in (1, 2, 3)]
    one, other = write(tmp_path / "one", rows), write(tmp_path / "other", rows[1:2])
    result = score("pope", one, annotations, against=other)
    against = result["against"]
    assert (against["rows"], against["rows_only_here"], against["rows_only_there"]) == (1, 2, 0)
    assert (against["score"], against["difference"]) == (1.0, 0.0)
    assert f"{other}: 3 rows are missing: 1, 3, 4" in result["problems"]


def test_a_true_answer_may_be_an_options_number_in_a_file_of_predictions_too(tmp_path: Path) -> None:
    """As in the set itself: numbers from 0, even where an option is called by another number."""
    asked = {"question": "How many?", "choices": ["1", "2", "0"]}
    rows = [{**asked, "id": f"r{k}", "answer": k, "prediction": said} for k, said in enumerate("ABA")]
    result = score("multiple_choice", write(tmp_path / "p.jsonl", rows))
    assert (result["score"], result["bad"]) == (pytest.approx(2 / 3), 0)
    own = write(tmp_path / "own.jsonl", [{key: row[key] for key in row if key != "prediction"} for row in rows])
    again = score("multiple_choice", tmp_path / "p.jsonl", annotations=own)
    assert (again["score"], again["problems"]) == (result["score"], [])


def test_a_number_as_the_true_answer_of_a_published_set_is_an_options_text(tmp_path: Path) -> None:
    asked = {"id": "r0", "audio_id": "a.wav", "question": "How many?", "choices": ["3", "4", "5", "2"], "answer": 3}
    own = find_benchmark("mmau").prompt({**asked, "task": "sound"}, 0)
    assert own.messages[-1].text == "A"
    row = {"id": own.id, "index": 0, "prediction": "A", "answer": "A", "unit": "a.wav", "meta": own.meta, "error": None}
    for name, told in (("own", row), ("published", {**asked, "model_output": "A"})):
        assert score("mmau", write(tmp_path / f"{name}.jsonl", [told]))["score"] == 1.0
