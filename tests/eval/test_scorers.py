"""Scorers against re-computation by hand: every expected number below is worked out without the code under test."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schema import UserError
from data.sources.ave import format_event
from eval.benchmarks import BENCHMARKS, find_benchmark
from eval.benchmarks.base import Benchmark, Row, file_stem, normalise
from eval.benchmarks.choices import choose
from eval.benchmarks.events import Event, labels, overlap
from eval.benchmarks.short_answer import question_type
from eval.benchmarks.transcription import letter_errors, word_errors
from eval.intervals import bootstrap_interval

avqa, events, spoken, transcription, images, told = (
    BENCHMARKS[f"miniworld_{name}"] for name in ("avqa", "events", "spoken", "transcription", "images", "told")
)
TRUTHS = {
    "miniworld_events": format_event("bell", 1, 4),
    "ave": format_event("church bell", 1, 4),
    **dict.fromkeys(("mmbench", "seed_bench", "mmau", "air_bench", "multiple_choice"), "B"),
}
LONG = "la " * 350_000  # a million characters and more


def rows(*pairs: tuple[str, str], **meta: list[Any]) -> list[Row]:
    """Rows of (prediction, answer); meta: one list per key."""
    return [
        Row(id=str(i), index=i, prediction=p, answer=a, meta={k: v[i] for k, v in meta.items()}, unit=str(i))
        for i, (p, a) in enumerate(pairs)
    ]


def bad(answer: str = "", **meta: Any) -> Row:
    return Row(id="bad", index=99, answer=answer, prediction="", meta=meta, unit="bad", error="the file is broken")


# ---- short answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Two. ", "two"),
        ("\n<answer>  Yes!</answer>", "answer yes answer"),
        ("Don't", "dont"),
        ("left-hand\tside", "left hand side"),
        ("ＹＥＳ", "yes"),
        ("да", "да"),
        ("はい。", "はい"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize("path", ["b.wav", "a/b.wav", "C:\\a\\b.wav", "a\\c/b.flac", "b"])
def test_a_files_stem_is_its_name_on_every_system(path: str) -> None:
    assert file_stem(path) == "b"


def test_questions_by_type() -> None:
    kinds = [["Audio", "Counting"]] * 4 + [["Audio-Visual", "Existential"]] * 3 + [["Audio", "Comparative"]]
    metrics = avqa.score(
        rows(
            ("two", "two"),  # right
            ("Two.", "TWO"),  # right after normalising
            ("two", "three"),  # wrong
            ("2", "two"),  # another word: wrong, though parsed
            ("yes", "yes"),  # right
            ("", "no"),  # unparsed
            ("да", "yes"),  # another script: wrong
            ("the answer to this question is probably yes", "Yes!"),  # no short answer: unparsed
            question_type=kinds,
        )
    )
    assert metrics["score"] == pytest.approx(3 / 8)
    assert (metrics["rows"], metrics["parsed"], metrics["unparsed"], metrics["bad"]) == (8, 6, 2, 0)
    assert list(metrics["metrics"]["types"]) == sorted(metrics["metrics"]["types"])
    assert metrics["metrics"]["types"] == {
        "Audio Comparative": {"rows": 1, "accuracy": 0.0, "majority": 1.0},
        "Audio Counting": {"rows": 4, "accuracy": 0.5, "majority": 0.75},
        "Audio-Visual Existential": {"rows": 3, "accuracy": pytest.approx(1 / 3), "majority": pytest.approx(2 / 3)},
    }
    assert metrics["metrics"]["scenes"]["Audio"] == {
        "rows": 5,
        "accuracy": pytest.approx(2 / 5),
        "majority": pytest.approx(4 / 5),
    }
    # truths: two x3, three x1, yes x3, no x1 -> one answer for all gets 3 of 8; one per type 3 + 2 + 1 = 6 of 8
    assert metrics["metrics"]["baselines"] == {"majority_answer": 3 / 8, "majority_answer_by_type": 6 / 8}


@pytest.mark.parametrize(
    ("meta", "kind"),
    [
        ({"question_type": ["Audio", "Counting"], "type": "x"}, ("Audio", "Counting")),
        ({"type": '["Visual", "Location"]'}, ("Visual", "Location")),
        ({"question_type": "Counting"}, ("Counting",)),
        ({"question_type": [1, "a"]}, ("1", "a")),
        ({"type": "[broken"}, ("[broken",)),
        ({"type": "[]"}, ("[]",)),
        ({"question_type": []}, ("unknown",)),
    ],
)
def test_the_type_of_a_question(meta: dict[str, Any], kind: tuple[str, ...]) -> None:
    assert question_type(Row("", 0, meta=meta)) == kind


def test_a_short_answer_has_six_words_at_most() -> None:
    assert avqa.parse("One two three, four five six.") == "one two three four five six"
    assert avqa.parse("one two three four five six seven") is None


def test_a_bad_row_is_wrong_and_counted() -> None:
    metrics = avqa.score([*rows(("yes", "yes"), question_type=[["Visual", "Location"]]), bad(), bad("yes")])
    assert metrics["score"] == pytest.approx(1 / 3)
    assert (metrics["rows"], metrics["parsed"], metrics["unparsed"], metrics["bad"]) == (3, 1, 0, 2)
    assert sum(line["rows"] for line in metrics["metrics"]["types"].values()) == 3


def test_a_substring_is_not_an_answer() -> None:
    assert spoken.score(rows(("no", "piano"), ("piano", "no")))["score"] == 0.0


def test_a_row_that_can_earn_nothing_is_not_right() -> None:
    class Weighted(Benchmark):
        name = "weighted"

        def parse(self, text: str) -> str:
            return text

        def points(self, row: Row) -> tuple[float, float]:
            return float(row.prediction), float(row.answer)

    pairs = rows(("2", "2"), ("1", "2"), ("0", "0"))
    assert [Weighted().to_json(row)["correct"] for row in pairs] == [True, False, False]
    assert Weighted().score(pairs)["score"] == 3 / 4


# ---- events ----------------------------------------------------------------------------------------------------------


def test_labels_are_half_open_seconds() -> None:
    assert labels(Event("bell", 2, 5)) == [""] * 2 + ["bell"] * 3 + [""] * 5
    assert labels(Event("bell", 0, 10)) == ["bell"] * 10
    assert labels(Event("bell", 9, 10)) == [""] * 9 + ["bell"]
    assert labels(Event("bell", 0, 999)) == ["bell"] * 10
    assert labels(Event("bell", 2.4, 4.6)) == [""] * 2 + ["bell"] * 3 + [""] * 5  # middles 2.5, 3.5, 4.5
    assert labels(Event("bell", 2.5, 4.5)) == [""] * 2 + ["bell"] * 2 + [""] * 6  # from 2.5 on, before 4.5
    assert labels(Event("bell", 2.6, 4.4)) == [""] * 3 + ["bell"] + [""] * 6  # middle 3.5 only


def test_events_by_hand() -> None:
    said, true = format_event, format_event
    metrics = events.score(
        rows(
            (said("red bell", 2, 5), true("red bell", 2, 5)),  # 10 right
            (said("Red Bell", 2, 8), true("red bell", 2, 5)),  # 5, 6, 7 wrong -> 7; overlap 3/6
            (said("drum", 2, 5), true("red bell", 2, 5)),  # three wrong names -> 7; overlap 1
            (said("drum", 0, 3), true("drum", 6, 10)),  # 0, 1, 2 and 6..9 wrong -> 3; overlap 0
            ("I hear a drum", true("drum", 0, 4)),  # unparsed: 0, though six of its seconds are background
            (said("drum", 5, 5), true("drum", 0, 4)),  # an empty range is none: unparsed
        )
    )
    assert metrics["score"] == pytest.approx((10 + 7 + 7 + 3) / 60)
    assert (metrics["parsed"], metrics["unparsed"]) == (4, 2)
    assert metrics["metrics"]["event_accuracy"] == pytest.approx(3 / 6)
    assert metrics["metrics"]["exact"] == pytest.approx(1 / 6)
    assert metrics["metrics"]["mean_iou"] == pytest.approx((1 + 0.5 + 1 + 0) / 6)
    # truths: bell 3 + 3 + 3 seconds, drum 4 + 4 + 4; both names three times, the first one counts as the most frequent
    assert metrics["metrics"]["baselines"]["true_category_whole_clip"] == pytest.approx(21 / 60)
    assert metrics["metrics"]["baselines"]["majority_category_whole_clip"] == pytest.approx(9 / 60)


def test_intervals_that_touch_or_overlap_are_one() -> None:
    assert Event("bell", 3, 5, ((0, 3), (7, 9), (8, 8.5), (6, 6))).intervals == [(0, 5), (7, 9)]


def test_a_row_is_exact_by_its_labels() -> None:
    whole, longer = format_event("bell", 0, 10), format_event("bell", 0, 12)
    metrics = events.score(rows((longer, whole), (format_event("bell", 0, 9), whole)))
    assert metrics["metrics"]["exact"] == 1 / 2
    assert metrics["score"] == 19 / 20


def test_an_event_without_truth_costs_ten_labels() -> None:
    metrics = events.score([*rows((format_event("drum", 0, 5), format_event("drum", 0, 5))), bad()])
    assert metrics["score"] == pytest.approx(0.5)
    assert metrics["metrics"]["baselines"]["true_category_whole_clip"] == pytest.approx(5 / 20)


@given(st.integers(0, 9), st.integers(1, 10), st.integers(0, 9), st.integers(1, 10), st.booleans())
@settings(max_examples=60, deadline=None)
def test_event_points_equal_a_loop_over_seconds(a: int, length: int, c: int, span: int, same: bool) -> None:
    b, d = min(10, a + length), min(10, c + span)
    row = rows((format_event("bell" if same else "drum", a, b), format_event("bell", c, d)))[0]
    right = 0
    for second in range(10):
        heard = second in range(a, b)
        true = second in range(c, d)
        right += (heard and true and same) or (not heard and not true)
    assert events.points(row) == (right, 10)
    both = len(set(range(a, b)) & set(range(c, d)))
    either = len(set(range(a, b)) | set(range(c, d)))
    assert overlap(Event("x", a, b), Event("y", c, d)) == pytest.approx(both / either)


# ---- transcription ---------------------------------------------------------------------------------------------------


def levenshtein(one: list[str], other: list[str]) -> int:
    """The textbook table."""
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    table[:, 0], table[0, :] = range(len(one) + 1), range(len(other) + 1)
    for i, a in enumerate(one, 1):
        for j, b in enumerate(other, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a != b))
    return int(table[-1, -1])


words = st.lists(st.sampled_from(["a", "red", "bell", "rings", "twice"]), max_size=8)


@given(words, words)
@settings(max_examples=80, deadline=None)
def test_errors_equal_the_textbook(said: list[str], heard: list[str]) -> None:
    assert word_errors(" ".join(said), " ".join(heard)) == (levenshtein(said, heard), len(said))
    letters = levenshtein(list(" ".join(said)), list(" ".join(heard)))
    assert letter_errors(" ".join(said), " ".join(heard)) == (letters, len(" ".join(said)))


def test_transcripts_by_hand() -> None:
    metrics = transcription.score(
        rows(
            ("The red bell rings.", "the red bell rings"),  # 0 of 4
            ("the bell rings twice", "the red bell rings"),  # one deleted, one inserted: 2 of 4
            ("", "two drums"),  # 2 of 2, unparsed
            ("тук тук тук", "a drum"),  # 2 substituted, 1 inserted: 3 of 2
        )
    )
    assert metrics["metrics"]["wer"] == pytest.approx(7 / 12)
    assert metrics["score"] == pytest.approx(5 / 12)
    assert metrics["metrics"]["exact"] == pytest.approx(1 / 4)
    assert (metrics["parsed"], metrics["unparsed"]) == (3, 1)
    # letters: 0 of 18, "red " deleted and " twice" inserted 10 of 18, 9 of 9, and the last by the table
    last = levenshtein(list("a drum"), list("тук тук тук"))
    assert metrics["metrics"]["cer"] == pytest.approx((0 + 10 + 9 + last) / (18 + 18 + 9 + 6))


def test_a_bad_recording_counts_all_its_words() -> None:
    metrics = transcription.score([*rows(("one two", "one two")), bad("three four five six")])
    assert metrics["metrics"]["wer"] == pytest.approx(4 / 6)


def test_a_transcript_is_parsed_as_it_is_compared() -> None:
    asr = BENCHMARKS["asr"]
    assert (asr.parse("It's twenty-three!"), asr.parse("uh")) == ("it is 23", None)
    assert asr.correct(rows(("", "uh"))[0])  # silence, as the normaliser has it
    assert not asr.correct(bad("uh"))


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("No, there is yes and no", "no"),
        ("there is none, so no", "no"),
        ("maybe yes, maybe no", None),
        ("I know", None),
        ("да", None),
        ("", None),
    ],
)
def test_yes_or_no(text: str, answer: str | None) -> None:
    assert images.parse(text) == answer


def test_images_by_hand() -> None:
    metrics = images.score(
        rows(
            ("yes", "yes"),
            ("yes", "yes"),
            ("yes", "no"),
            ("no", "yes"),
            ("no", "no"),
            ("hmm", "yes"),
            ("", "no"),
        )
    )
    assert metrics["score"] == pytest.approx(3 / 7)
    assert metrics["metrics"]["precision"] == pytest.approx(2 / 3)
    assert metrics["metrics"]["recall"] == pytest.approx(2 / 4)
    assert metrics["metrics"]["f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert metrics["metrics"]["yes_ratio"] == pytest.approx(3 / 7)
    assert metrics["unparsed"] == 2
    assert metrics["metrics"]["baselines"]["majority_answer"] == pytest.approx(4 / 7)


def test_rows_without_a_truth_are_no_most_frequent_answer() -> None:
    assert images.score([*rows(("yes", "yes")), bad(), bad()])["metrics"]["baselines"]["majority_answer"] == 1 / 3
    lettered = BENCHMARKS["multiple_choice"].score([*rows(("A", "A")), bad(), bad()])
    assert lettered["metrics"]["baselines"]["majority_letter"] == 1 / 3


def test_images_without_a_yes() -> None:
    metrics = images.score(rows(("no", "no"), ("no", "no")))
    assert metrics["score"] == 1.0
    assert metrics["metrics"] == {
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0,
        "baselines": {"majority_answer": 1},
    }


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_choices_by_category() -> None:
    said = [("B it is", "B"), ("the cat", "B"), ("A", "B"), ("A", "A")]
    table = rows(*said, choices=[["dog", "cat"]] * 4, category=["x", 2, "x", None])
    result = BENCHMARKS["multiple_choice"].score([*table, bad(category="x")])
    strict, official = result["rules"]["strict"], result["rules"]["official"]  # the script reads B E - - -
    assert (strict["score"], official["score"]) == (pytest.approx(3 / 5), pytest.approx(1 / 5))
    assert list(strict["category"]) == ["2", "x"]
    assert strict["category"] == {"2": {"rows": 1, "accuracy": 1.0}, "x": {"rows": 3, "accuracy": pytest.approx(1 / 3)}}
    assert official["category"] == {
        "2": {"rows": 1, "accuracy": 0.0},
        "x": {"rows": 3, "accuracy": pytest.approx(1 / 3)},
    }
    assert strict["baselines"] == {"majority_letter": pytest.approx(3 / 5)}
    assert "category" not in BENCHMARKS["multiple_choice"].score(table[3:])["metrics"]


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_strange_answers_are_counted_and_survive_a_file(name: str) -> None:
    benchmark = BENCHMARKS[name]
    truth = TRUTHS.get(name, "yes")
    strange = ["", " ", LONG, "x" + " " * 1_000_000 + "from", "\ud800", "0" * 5000, "\x00", "ʼ" * 40, "نعم"]
    table = rows(*((text, truth) for text in strange), (truth, truth))
    metrics = benchmark.score(table)
    assert metrics["rows"] == len(table) == metrics["parsed"] + metrics["unparsed"] + metrics["bad"]
    assert metrics["unparsed"] >= 2
    lines = [json.dumps(benchmark.to_json(row)) for row in table]
    again = [json.loads(line) for line in lines]
    kept = ("id", "index", "answer", "prediction", "meta", "unit", "error")
    assert benchmark.score([Row(**{key: row[key] for key in kept}) for row in again]) == metrics
    if name != "audiocaps":
        assert [row["correct"] for row in again] == [False] * len(strange) + [True]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_bad_row_earns_nothing_whatever_was_said(name: str) -> None:
    benchmark, truth = BENCHMARKS[name], TRUTHS.get(name, "yes")
    (row,) = rows((truth, truth))
    row.error = "the file is broken"
    result = benchmark.score([row])
    assert (result["score"], result["bad"], result["parsed"]) == (float(benchmark.lower_is_better), 1, 0)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_thoughts_are_no_part_of_an_answer(name: str) -> None:
    """<think> ... </think> of reasoning models, also where the prompt has opened it, or nothing came after it."""
    benchmark, truth = BENCHMARKS[name], TRUTHS.get(name, "yes")
    thoughts = f"no (B) A flute. <answer> two </answer> {truth} zebra"
    plain = benchmark.score(rows((truth, truth), ("", truth), ("", truth)))
    thought = (f"<think>\n{thoughts}\n</think>\n\n{truth}", f"<think>{thoughts}", f"{thoughts}</think>\n")
    told = benchmark.score(rows(*((text, truth) for text in thought)))
    assert plain["rules"]["strict"] == told["rules"]["strict"]
    assert benchmark.score(rows((f"{thoughts}</think>{truth}", truth)))["parsed"] == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It barks, so <answer>B</answer>", "B"),
        ("Not A. <answer>A</answer> No: <answer> (C) </answer>.", "C"),
        (r"A rises, D falls: \boxed{B}", "B"),
        (r"\boxed{A}, or rather $\boxed{\text{D}}$.", "D"),
        (r"<answer>\boxed{B}</answer> A", "B"),
        ("B <answer></answer>", None),
        (r"B \boxed{}", None),
        (r"\boxed{ \text{B}}", "B"),
        (r"A? \boxed{B, which is the second of all}", "B"),
        ("<answer>C <answer>B</answer>", "C"),
        (r"B \boxed{", "B"),
        ("<answer>B", None),
    ],
)
def test_what_is_marked_as_the_answer_is_it(text: str, answer: str | None) -> None:
    assert choose(text) == answer


@pytest.mark.parametrize(
    "text", [r"Is it? Yes, no: \boxed{no}", "Yes. <answer> No. </answer>", r"yes <answer>\boxed{no}</answer>"]
)
def test_what_is_marked_as_a_word_is_it(text: str) -> None:
    assert images.parse(text) == avqa.parse(text) == "no"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_nothing_to_score(name: str) -> None:
    metrics = BENCHMARKS[name].score([])
    assert (metrics["score"], metrics["interval"], metrics["rows"]) == (0.0, None, 0)
    assert BENCHMARKS[name].score([bad(), bad()])["bad"] == 2


def test_a_configuration_knows_the_benchmarks_without_importing_them() -> None:
    from mokamm import names

    assert set(names.BENCHMARKS) == set(BENCHMARKS)


def test_an_unknown_benchmark_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'miniworld_avqa'.*known: air_bench, asr"):
        find_benchmark("miniworld_avq")


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_equals_a_plain_bootstrap() -> None:
    """Against drawing clips with replacement one by one, by another generator: the same up to sampling noise."""
    generator = np.random.default_rng(7)
    units = [f"clip {i // 5}" for i in range(200)]
    earned = [(float(generator.random() < 0.3 + 0.5 * ((i // 5) % 2)), 1.0) for i in range(200)]
    by_clip: dict[str, list[float]] = {}
    for (points, _), unit in zip(earned, units, strict=True):
        by_clip.setdefault(unit, []).append(points)
    clips = list(by_clip.values())
    draws = [np.mean([v for k in generator.integers(40, size=40) for v in clips[k]]) for _ in range(4000)]
    low, high = bootstrap_interval(earned, units) or [0.0, 0.0]
    assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]).tolist(), abs=0.015)
    single = bootstrap_interval(earned, [str(i) for i in range(200)]) or [0.0, 0.0]
    assert (
        single[1] - single[0] < high - low
    )  # questions of a clip go together here: by question it would look too sure


def test_the_interval_is_repeatable_and_bounded() -> None:
    earned, units = [(1.0, 1.0), (0.0, 1.0), (1.0, 1.0)], ["a", "b", "c"]
    first = bootstrap_interval(earned, units)
    assert first == bootstrap_interval(earned, units)
    assert first is not None
    assert 0 <= first[0] <= 2 / 3 <= first[1] <= 1
    assert bootstrap_interval(earned, ["a"] * 3) is None
    assert bootstrap_interval([(0.0, 0.0)] * 3, units) == [0.0, 0.0]
