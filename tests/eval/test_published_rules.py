"""The strict and the official rule of each published benchmark, against plain re-computations and rows worked by hand."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.benchmarks import BENCHMARKS
from eval.benchmarks.ave import NAMES
from eval.benchmarks.base import Row
from eval.benchmarks.choices import choose, official_choice, options_in, true_letter
from eval.benchmarks.fields import take_apart
from eval.benchmarks.music_avqa import ANSWERS
from eval.score import score


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(tmp_path: Path, name: str, rows: list[dict[str, Any]], annotations: Path | None = None) -> dict[str, Any]:
    return score(name, write(tmp_path / "predictions.jsonl", rows), annotations)


# ---- AVE -------------------------------------------------------------------------------------------------------------


def ave(video: str, event: str, start: int, end: int, predict: str) -> dict[str, Any]:
    return {
        "instruction": "Which event, and when?",
        "output": f"event:{event} start_time:{start} end_time:{end}</s>",
        "video_path": f"data/AVE/{video}.mp4",
        "predict": predict,
    }


def ave_by_arrays(rows: list[dict[str, Any]]) -> tuple[float, float, int]:
    """(official, strict, parsed): two arrays of zeros filled from the front, and a loop over seconds."""
    size = 10 * len(rows)
    predicted, true = np.zeros(size, int), np.zeros(size, int)
    place, strict = 0, 0
    for row in rows:
        event, start, end = re.fullmatch(r"event:(.*) start_time:(\d+) end_time:(\d+)</s>", row["output"]).groups()  # type: ignore[union-attr]
        truth = [NAMES.index(event) + 1 if int(start) <= k < int(end) else 0 for k in range(10)]
        names = re.findall(r"<event>(.*?)</event>", row["predict"])
        ranges = re.findall(r"<range>\s*(\d+)\s*,\s*(\d+)\s*</range>", row["predict"])
        if len(names) != 1 or names[0].strip() not in NAMES or not ranges:
            continue
        said = [0] * 10
        for a, b in ranges:
            for k in range(int(a), min(int(b), 9) + 1):
                said[k] = NAMES.index(names[0].strip()) + 1
        predicted[place : place + 10], true[place : place + 10] = said, truth
        strict += sum(a == b for a, b in zip(said, truth, strict=True))
        place += 10
    return float(np.mean(predicted == true)), strict / size, place // 10


events = st.sampled_from(["Church bell", "Frying (food)", "Violin, fiddle", "Bark"])
second = st.integers(0, 9)
answers = st.one_of(
    st.builds(lambda e, a, b: f"I see <event> {e} </event> at <range> {a},{b} </range>.", events, second, second),
    st.builds(
        lambda e, a, b: f"<event>{e}</event><range>{a}, {b}</range><range> {b},12 </range>", events, second, second
    ),
    st.builds(lambda e, a: f"<event> {e} </event> <event> Bus </event> <range> {a},9 </range>", events, second),
    st.sampled_from(["", "<event> Bark </event>", "<event> Dog </event> <range> 0,9 </range>", "<range> 1,2 </range>"]),
)


@given(st.lists(st.tuples(events, second, st.integers(1, 10), answers), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_ave_equals_two_arrays(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, int, int, str]]
) -> None:
    rows = [ave(f"v{i}", e, a, min(10, a + n), said) for i, (e, a, n, said) in enumerate(table)]
    result = scored(tmp_path_factory.mktemp("ave"), "ave", rows)
    official, strict, parsed = ave_by_arrays(rows)
    assert result["rules"]["official"]["score"] == pytest.approx(official)
    assert result["rules"]["strict"]["score"] == pytest.approx(strict)
    assert (result["parsed"], result["unparsed"], result["rows"]) == (parsed, len(rows) - parsed, len(rows))


def test_ave_by_hand(tmp_path: Path) -> None:
    rows = [
        ave("a", "Church bell", 0, 10, "<event> Church bell </event> <range> 0,9 </range>"),  # 10
        ave(
            "b", "Bark", 2, 5, "<event> Bark </event> <range> 2,3 </range> or <range> 6,6 </range>"
        ),  # 4 and 6 wrong: 8
        ave("c", "Frying (food)", 1, 4, "<event> Frying (food) (1 3) </event>"),  # the form without a range: 10
        ave("d", "Bus", 0, 4, "<event> Truck </event> <range> 0,3 </range>"),  # four wrong names: 6
        ave("e", "Bus", 0, 4, "a bus from 0 to 4"),  # unparsed
        ave("f", "Bus", 0, 4, "<event> bus </event> <range> 0,3 </range>"),  # its name is `Bus`
        ave("g", "Bus", 3, 6, "<event> Bus </event> <range> 5,3 </range>"),  # an empty range: seven are background
    ]
    result = scored(tmp_path, "ave", rows)
    strict, official = result["rules"]["strict"], result["rules"]["official"]
    assert strict["score"] == pytest.approx((10 + 8 + 10 + 6 + 0 + 10 + 7) / 70)
    assert official["score"] == pytest.approx((10 + 8 + 10 + 6 + 10 + 10 + 7) / 70)  # e and f lie in the tail
    assert (strict["parsed"], official["parsed"]) == (6, 5)
    assert strict["event_accuracy"] == pytest.approx(5 / 7)
    whole = strict["baselines"]
    assert whole["true_category_whole_clip"] == pytest.approx((10 + 3 + 3 + 4 + 4 + 4 + 3) / 70)
    assert whole["predicted_category_whole_clip"] == pytest.approx((10 + 3 + 3 + 0 + 0 + 4 + 3) / 70)


def test_ave_truth_is_the_annotation_and_other_splits_are_not_missing(tmp_path: Path) -> None:
    lines = ["Category&VideoID&Quality&StartTime&EndTime", "Bus&a&good&0&4", "Male speech, man speaking&-b_1&good&2&5"]
    said = "<event> Male speech, man speaking </event> <range> 2,4 </range>"
    rows = [ave("a", "Bus", 5, 9, "<event> Bus </event> <range> 0,3 </range>"), ave("-b_1", "Bus", 0, 1, said)]
    small = tmp_path / "testSet.txt"
    small.write_text("\n".join([*lines, "Cat&c&good&0&10"]) + "\n")
    result = scored(tmp_path, "ave", rows, small)
    assert result["rules"]["strict"]["score"] == pytest.approx(20 / 30)
    assert result["rules"]["official"]["score"] == 1.0
    assert (result["missing"], result["rules"]["strict"]["rows"], result["rows"]) == (1, 3, 2)
    whole = tmp_path / "Annotations.txt"
    whole.write_text("\n".join([*lines, *(f"Cat&c{i}&good&0&10" for i in range(9))]) + "\n")
    result = scored(tmp_path, "ave", rows, whole)
    assert (result["missing"], result["rules"]["strict"]["score"]) == (0, 1.0)
    for more, missing in ((400, 400), (401, 0)):  # under any name: the test split has 402 clips
        (tmp_path / "all.txt").write_text("\n".join([*lines, *(f"Cat&c{i}&good&0&10" for i in range(more))]) + "\n")
        assert scored(tmp_path, "ave", rows, tmp_path / "all.txt")["missing"] == missing


# ---- MUSIC-AVQA ------------------------------------------------------------------------------------------------------


def music(truth: str, predict: str, *kind: str) -> dict[str, Any]:
    return {"output": f"{truth}</s>", "question_type": list(kind or ("Audio", "Counting")), "predict": predict}


def test_there_are_42_answers_and_28_events() -> None:
    assert (len(set(ANSWERS)), len(set(NAMES))) == (42, 28)


def test_music_avqa_by_hand(tmp_path: Path) -> None:
    rows = [
        music("two", "<answer> two </answer>"),  # right
        music("no", "<answer> piano </answer>"),  # right for the script only
        music("one", "the <answer>xylophone</answer>", "Visual", "Location"),  # right for the script only
        music("yes", "<answer> no </answer>", "Visual", "Location"),  # wrong
        music("acoustic_guitar", "<answer> acoustic_guitar </answer>", "Visual", "Location"),  # right
        music("two", "two"),  # no tags: unparsed
        music("two", "<answer> two </answer> <answer> two </answer>"),  # two answers: unparsed
        music("two", "<answer> trombone </answer>"),  # none of the 42: unparsed
        music("two", "<answer> Two. </answer>"),  # read as it is meant; not by the script
        music("two", ""),
    ]
    result = scored(tmp_path, "music_avqa", rows)
    strict, official = result["rules"]["strict"], result["rules"]["official"]
    assert strict["score"] == pytest.approx(3 / 10)
    assert official["score"] == pytest.approx(4 / 5)
    assert (result["rows"], result["parsed"], result["unparsed"], result["duplicates"]) == (10, 6, 4, 0)
    assert (official["parsed"], official["unparsed"]) == (5, 5)
    assert strict["types"]["Visual Location"]["accuracy"] == pytest.approx(1 / 3)
    assert official["types"] == {
        "Audio Counting": {"rows": 7, "parsed": 2, "accuracy": 1.0},
        "Visual Location": {"rows": 3, "parsed": 3, "accuracy": pytest.approx(2 / 3)},
    }


@given(
    st.lists(st.tuples(st.sampled_from(ANSWERS), st.sampled_from([*ANSWERS, "guitar", ""])), min_size=1, max_size=20)
)
@settings(max_examples=40, deadline=None)
def test_music_avqa_equals_a_loop(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    result = scored(
        tmp_path_factory.mktemp("music"), "music_avqa", [music(t, f"x <answer> {p} </answer>") for t, p in pairs]
    )
    parsed = [(t, p) for t, p in pairs if p in ANSWERS]
    inside = [t in p for t, p in parsed]
    assert result["rules"]["official"]["score"] == pytest.approx(np.mean(inside) if inside else 0.0)
    assert result["rules"]["strict"]["score"] == pytest.approx(np.mean([t == p for t, p in pairs]))
    assert result["unparsed"] == len(pairs) - len(parsed)


# ---- MME, POPE -------------------------------------------------------------------------------------------------------


def image_row(i: int, image: str, question: str, answer: str, output: str, **more: Any) -> dict[str, Any]:
    head = {"rank": 0, "index": i, "image_path": image, "question": question}
    return {**head, "answer": answer, "output": [output], **more}


def mme_table(rows: list[dict[str, Any]], subtask: str) -> tuple[float, float]:
    """(acc, acc+) of a subtask by the published rule, per cent."""
    mine = [row for row in rows if row["subtask"] == subtask]
    right = [("yes" if "yes" in row["output"][0].lower() else "no") == row["answer"].lower() for row in mine]
    images = sorted({row["image_path"] for row in mine})
    pairs = [all(r for r, row in zip(right, mine, strict=True) if row["image_path"] == image) for image in images]
    return 100 * sum(right) / len(right), 100 * sum(pairs) / len(pairs)


def test_mme_equals_a_loop(tmp_path: Path) -> None:
    generator = random.Random(3)
    perception = [
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ]
    cognition = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
    rows = [
        image_row(
            0,
            f"{name}/{k}.jpg",
            f"q{half}?",
            ("Yes", "No")[half],
            generator.choice(["Yes.", "no", "Yes, eyes", "No </s>"]),
        )
        | {"subtask": name}
        for name in perception + cognition
        for k in range(9)
        for half in (0, 1)
    ]
    result = scored(tmp_path, "mme", rows)
    strict, official = result["rules"]["strict"], result["rules"]["official"]
    tables = {name: mme_table(rows, name) for name in perception + cognition}
    for name, (acc, plus) in tables.items():
        assert official["subtasks"][name]["acc"] == pytest.approx(acc)
        assert official["subtasks"][name]["acc+"] == pytest.approx(plus)
        assert official["subtasks"][name]["images"] == 9
    own = sum(sum(tables[name]) for name in perception)
    for rule in (strict, official):  # the interval is that of the sum over subtasks
        low, high = rule["interval"]
        assert rule["score"] - 400 < low < rule["score"] < high < rule["score"] + 400
    assert strict["score"] == pytest.approx(own)  # all answers are plain, so that both rules read them alike
    assert official["perception_own_scene"] == pytest.approx(own)
    assert official["perception"] == official["score"]
    assert list(official["subtasks"]) == perception + cognition
    assert official["score"] == pytest.approx(own - sum(tables["scene"]) + sum(tables["posters"]))
    assert official["cognition"] == strict["cognition"] == pytest.approx(sum(sum(tables[name]) for name in cognition))
    assert (result["scale"], result["duplicates"]) == ("points", 0)


def test_mme_strict_wants_an_answer_and_both_rows(tmp_path: Path) -> None:
    rows = [
        image_row(0, "MME/count/1.jpg", "a", "Yes", "Yes"),
        image_row(1, "MME/count/1.jpg", "b", "No", "I cannot tell"),  # `no` for the script, unparsed here
        image_row(2, "MME/count/2.jpg", "a", "Yes", "yes"),  # its second row is not there
    ]
    result = scored(tmp_path, "mme", rows)
    strict, official = (result["rules"][rule]["subtasks"]["count"] for rule in ("strict", "official"))
    assert (strict["acc"], strict["acc+"]) == (pytest.approx(200 / 3), 0.0)
    assert (official["acc"], official["acc+"]) == (100.0, 50.0)
    assert result["rules"]["official"]["perception"] == 150
    assert (result["parsed"], result["unparsed"]) == (2, 1)


def test_an_image_with_more_rows_than_two_wants_all_of_them(tmp_path: Path) -> None:
    rows = [
        image_row(k, f"MME/count/{i}.jpg", f"q{k}", "Yes", said) for i in (1, 2) for k, said in enumerate(["yes"] * 3)
    ]
    rows[-1]["output"] = ["no"]
    for rule in scored(tmp_path, "mme", rows)["rules"].values():
        assert rule["subtasks"]["count"]["acc"] == pytest.approx(500 / 6)
        assert (rule["subtasks"]["count"]["acc+"], rule["subtasks"]["count"]["images"]) == (50.0, 2)


@pytest.mark.parametrize(
    ("more", "image", "subtask"),
    [
        ({"subtask": "ocr"}, "x/1.jpg", "OCR"),
        ({"category": " Count "}, "posters/1.jpg", "count"),
        ({"category": " mine "}, "posters/1.jpg", "mine"),
        ({"category": "mine", "subtask": "count"}, "posters/1.jpg", "count"),
        ({"subtask": " "}, "posters/1.jpg", "unknown"),
        ({"video_path": "posters/1.jpg"}, "", "posters"),
        ({}, "scene/MME/posters/images/1.jpg", "posters"),  # the innermost folder of that name
        ({}, "MME\\CODE_reasoning\\1.png", "code_reasoning"),
        ({}, "x/count.jpg", "unknown"),
        ({}, "x/count", "unknown"),  # a file of that name is no folder
    ],
)
def test_the_subtask_of_a_row(more: dict[str, str], image: str, subtask: str, tmp_path: Path) -> None:
    result = scored(tmp_path, "mme", [image_row(0, image, "a", "Yes", "Yes", **more)])
    strict = result["rules"]["strict"]
    assert list(strict["subtasks"]) == [subtask]
    assert strict["cognition"] == (100 if subtask == "code_reasoning" else 0)
    assert strict["perception"] == (100 if subtask in ("OCR", "count", "posters") else 0)


def test_pope_by_hand(tmp_path: Path) -> None:
    said = ["Yes", "yes, there is", "No", "I see no such thing", "its eyes are closed", "", "нет", "No, yes", "no </s>"]
    true = ["yes", "no", "no", "no", "no", "yes", "no", "yes", "yes"]
    rows = [image_row(i, f"{i}.jpg", "A dog?", t, s) for i, (s, t) in enumerate(zip(said, true, strict=True))]
    result = scored(tmp_path, "pope", rows)
    strict, official = result["rules"]["strict"], result["rules"]["official"]
    # strict reads yes yes no no - - - no no; official yes yes no no yes no no yes no
    assert strict["score"] == pytest.approx(3 / 9)
    assert official["score"] == pytest.approx(5 / 9)
    assert (result["parsed"], result["unparsed"], official["unparsed"]) == (6, 3, 0)
    assert (strict["precision"], strict["recall"]) == (pytest.approx(1 / 2), pytest.approx(1 / 4))
    assert strict["f1"] == pytest.approx(2 * (1 / 2) * (1 / 4) / (1 / 2 + 1 / 4))
    assert (official["precision"], official["recall"]) == (pytest.approx(2 / 4), pytest.approx(2 / 4))
    assert (strict["yes_ratio"], official["yes_ratio"]) == (pytest.approx(2 / 9), pytest.approx(4 / 9))
    assert "categories" not in strict | official


def test_pope_by_category(tmp_path: Path) -> None:
    rows = [
        image_row(0, "0.jpg", "A dog?", "yes", "Yes", category="random"),
        image_row(1, "1.jpg", "A dog?", "no", "its eyes", category="random"),  # yes for the script, unparsed here
        image_row(2, "2.jpg", "A dog?", "no", "Yes", category="random", subtask="popular"),
        image_row(3, "3.jpg", "A dog?", "yes", "No", subtask="adversarial"),
        image_row(4, "4.jpg", "A dog?", "no", "I see none", subtask="adversarial"),  # no for the script, unparsed here
        image_row(5, "5.jpg", "A dog?", "yes", "Yes", category=7),
    ]
    rules = scored(tmp_path, "pope", rows)["rules"]
    figures = ("rows", "accuracy", "precision", "recall", "f1", "yes_ratio")
    for rule, random_, adversarial in (
        ("strict", (3, 1 / 3, 1 / 2, 1, 2 / 3, 2 / 3), (2, 0, 0, 0, 0, 0)),
        ("official", (3, 1 / 3, 1 / 3, 1, 1 / 2, 1), (2, 1 / 2, 0, 0, 0, 0)),
    ):
        tables = rules[rule]["categories"]
        assert list(tables) == ["adversarial", "random"]
        assert tables["random"] == pytest.approx(dict(zip(figures, random_, strict=True)))
        assert tables["adversarial"] == pytest.approx(dict(zip(figures, adversarial, strict=True)))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("pope", "<think>Yes?</think>no", "yes"),
        ("mme", "<think>Yes?</think>no", "yes"),
        ("mmbench", "<think>a or </think>B ", "A"),
    ],
)
def test_the_published_scripts_read_thoughts_too(name: str, text: str, said: str) -> None:
    benchmark, (row,) = BENCHMARKS[name], [Row("0", 0, prediction=text)]
    assert (benchmark.official_reading(row), benchmark.reading(row)) == (said, {"yes": "no", "A": "B"}[said])


# ---- letters ---------------------------------------------------------------------------------------------------------

OPTIONS = ["a cat", "the dog", "A minor", "B minor"]


@pytest.mark.parametrize(
    ("text", "strict", "official"),
    [
        ("B", "B", None),
        ("B ", "B", None),  # stripped first: the script finds no `b `
        ("B</s>", "B", None),
        ("b", "B", None),
        ("(C)", "C", None),
        ("D.", "D", None),
        ("B the dog", "B", "B"),
        ("B a dog", "B", "A"),  # a is tried first
        ("c: it is", "C", None),
        ("a cat", None, "A"),  # an article
        ("A cat", "A", "A"),
        ("A or B", None, "A"),
        ("A, B", None, None),
        ("The answer is (B).", "B", "E"),
        ("Answer: d", "D", None),
        ("**Answer:** B", "B", None),
        ("**Answer**: (B)", "B", None),
        ("the answer is a dog", None, "A"),
        ("**Answer:** a dog", None, "A"),
        ("It is option C because", "C", "C"),
        ("it must be (D)", "D", "E"),
        ("(A) or (B)", None, None),
        ("Answer: B or C", None, "B"),
        ("banana b ", None, "A"),
        ("Because it is red", None, "E"),
        ("I think B", None, None),
        ("E", "E", None),  # the last letter where the options are not known
        ("F", None, None),
        ("", None, None),
        ("да", None, None),
        ("Д", None, None),
        ("C# it is", None, None),  # a note
        ("The answer is C#", None, "E"),
        ("**B**", "B", None),
        ('"C"', "C", None),
        ("C'est (B)", "B", None),
        ("D\u2019accord: (B)", "B", None),
        ("A, or B", None, None),
        ("A and/or B", None, "A"),
        ("(B) or C", None, None),
        ("A, Because it meows", "A", "E"),
        ("My choice is D", "D", "E"),
        ("An adoption C", None, None),
        ("two (b) of them", None, None),
        ("The answer is B, not (A).", "B", "E"),
        ("A. My choice is B", "A", "E"),
    ],
)
def test_letters(text: str, strict: str | None, official: str | None) -> None:
    assert choose(text) == strict
    assert official_choice(text) == official


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("a cat", "A"),
        ("It is the dog.", "B"),
        ("B minor", "D"),
        ("B - minor", "D"),
        ("a cat or the dog", None),
        ("C", "C"),
        ("E", None),
        (f"I {'hear and ' * 100}see the dog", "B"),
        (f"I {'hear and ' * 300}see the dog", None),  # too long for an option's own words
    ],
)
def test_options_by_their_text(text: str, letter: str | None) -> None:
    assert choose(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("A dog", ["cat", "dog"], "B"),  # an article
        ("The answer is A cat", ["dog", "cat"], "B"),
        ("Answer:A cat", ["dog", "cat"], "B"),
        ("A cat", ["cat", "dog"], "A"),
        ("A man is walking", ["cat", "dog"], "A"),  # names none of them
        ("A) dog", ["cat", "dog"], "A"),
        ("A", ["cat", "dog"], "A"),
        ("I hear a dog", [*(f"bird {k}" for k in range(8)), "cat", "dog"], "J"),
        ("C major is the key", ["A minor", "C major", "E minor", "G major"], "B"),
        ("The answer is c major", ["A minor", "C major", "E minor", "G major"], "B"),
        ("C because A minor is sad", ["A minor", "C major", "E minor", "G major"], "C"),  # no option's word
        ("B because the cat ran", ["cat", "dog"], "B"),
        ("A\n\nThe dog is not in it.", ["cat", "dog"], "A"),  # a line of its own
        ("a\nThe dog is not in it.", ["cat", "dog"], "A"),
        ("The answer is A\nThe dog is not in it.", ["cat", "dog"], "A"),
    ],
)
def test_a_letter_may_be_a_word(text: str, options: list[str], letter: str) -> None:
    assert choose(text, options) == letter


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("C#", ["C", "C#", "D"], "B"),
        (" c# ", ["C", "C#", "D"], "B"),
        ("-5", ["5", "-5"], "B"),
        ("5", ["5", "-5"], "A"),
        ("C", ["D", "C", "G"], "C"),  # an answer is asked for as a letter
        ("c", ["D", "C", "G"], "C"),
        ("C#</s>", ["C", "C#", "D"], "B"),
        ("X", ["x", "X "], "B"),
        ("x#", ["X", "X# "], "B"),
    ],
)
def test_an_options_very_text_goes_before_its_like(text: str, options: list[str], letter: str) -> None:
    assert choose(text, options) == letter


@pytest.mark.parametrize(("text", "options"), [("dog", ["dog", "dog", "cat"]), ("DOG", ["dog", "Dog", "cat"])])
def test_a_text_of_two_options_chooses_neither(text: str, options: list[str]) -> None:
    assert choose(text, options) is None
    assert choose("cat", options) == "C"
    assert true_letter(options[1], options) == ("B" if options[1] == "Dog" else "A")  # of like ones, the first


@pytest.mark.parametrize("text", ["It is a woman.", "WOMAN", "(B) Woman", "b) woman", "B"])
@pytest.mark.parametrize("style", ["({}) {}", "{}. {}", "{}) {}"])
def test_options_that_bear_their_letters_are_known_by_their_words(text: str, style: str) -> None:
    options = [style.format(letter, option) for letter, option in zip("ABC", ["Man", "Woman", "Child"], strict=True)]
    assert choose(text, options) == true_letter("Woman", options) == true_letter(options[1], options) == "B"
    assert choose("(C) major", ["(C) major", "(A) minor"]) == "A"  # other letters belong to the text


@pytest.mark.parametrize("empty", ["", " ", "!"])
def test_nothing_said_is_not_the_text_of_an_option_without_one(empty: str) -> None:
    assert choose("", [empty, "a cat"]) is choose("...", [empty, "a cat"]) is None
    assert true_letter("", [empty, "a cat"]) is None


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_the_official_letter_equals_a_loop(text: str) -> None:
    expected = None
    lowered = text.strip().lower()
    for letter in ("a", "b", "c", "d", "e"):
        if letter + " " in lowered:
            expected = letter.upper()
            break
    assert official_choice(text) == expected


def test_options_and_truths() -> None:
    assert options_in("Which?\nA. a cat\nB. the dog\nC) third\nnot one") == ["a cat", "the dog", "third"]
    assert options_in("?\n(A) a cat \nB: the dog") == ["a cat", "the dog"]
    assert options_in("\n".join(f"{letter}. x" for letter in "ABCDEFGHIJA")) == ["x"] * 10
    assert options_in("B. second first") == options_in("?\nA.\nB. no first") == []
    truths = ("b", "B</s>", "B. the dog", "the dog", "the dog</s>", "Zebra")
    assert [true_letter(text, OPTIONS) for text in truths] == ["B", "B", "B", "B", "B", None]
    numbers, notes = ["4", "2", "1", "3"], ["D", "C", "G", "A"]
    assert [true_letter("2", numbers, text_first=first) for first in (False, True)] == ["B", "B"]
    assert [true_letter("C", notes, text_first=first) for first in (False, True)] == ["C", "B"]
    assert [true_letter("C", numbers, text_first=first) for first in (False, True)] == ["C", "C"]
    assert true_letter("D", ["C", "D"]) == "B"  # no letter of two options
    assert true_letter("AB", ["AB", "CD"]) == "A"
    assert true_letter("A, minor", OPTIONS) == "C"
    assert options_in("?\nA. one\u2028line\nB. two") == ["one\u2028line", "two"]


@pytest.mark.parametrize("name", ["mmbench", "seed"])
def test_letter_benchmarks_by_hand(tmp_path: Path, name: str) -> None:
    question = "What is it?\nA. a cat\nB. a dog"
    said = ["B", "B a dog", "B the dog", "a dog", "the answer is unclear", "(B)"]
    rows = [image_row(i, f"{i}.jpg", question, "B", text) for i, text in enumerate(said)]
    result = scored(tmp_path, name, rows)
    assert result["rules"]["strict"]["score"] == pytest.approx(5 / 6)
    assert result["rules"]["official"]["score"] == pytest.approx(1 / 6)  # `b the dog` alone; unparsed rows stay
    assert (result["parsed"], result["unparsed"]) == (5, 1)
    assert result["rules"]["official"]["parsed"] == 4
    letters = image_row(0, "0.jpg", "Which?\nA. B\nB. A", "A", "A")  # a true answer is a letter here
    assert scored(tmp_path, name, [letters])["score"] == 1.0


@pytest.mark.parametrize("key", ["choices", "options"])
def test_a_true_answer_that_is_no_option_is_named(tmp_path: Path, key: str) -> None:
    row = {"id": "1", "audio_id": "1.wav", key: ["cat", "dog"], "answer": "Zebra", "model_output": "the dog"}
    assert scored(tmp_path, "mmau", [row | {"answer": "dog"}])["score"] == 1.0
    assert scored(tmp_path, "mmau", [row | {key: [3, 2], "answer": 2, "model_output": "it is 2"}])["score"] == 1.0
    asked = {key: "cat, dog", "question": "Which?\nA. cat\nB. dog"}  # no list: the question tells
    assert scored(tmp_path, "mmau", [row | asked | {"answer": "dog"}])["score"] == 1.0
    result = scored(tmp_path, "mmau", [row])
    assert (result["bad"], result["problems"][0]) == (1, "row 1: the true answer is no option's letter: 'Zebra'")


def test_circular_evaluation(tmp_path: Path) -> None:
    rows = [
        image_row(k * 1_000_000 + q, f"{q}.jpg", f"q{q} pass {k}", letter, said)
        for q, passes in enumerate([[("A", "A"), ("B", "B")], [("A", "A"), ("B", "A")], [("B", "A"), ("A", "A")]])
        for k, (letter, said) in enumerate(passes)
    ]
    strict = scored(tmp_path, "mmbench", rows)["rules"]["strict"]
    assert (strict["circular"], strict["vanilla"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert strict["score"] == pytest.approx(4 / 6)
    assert "circular" not in scored(tmp_path, "mmbench", rows[::2])["rules"]["strict"]
    without = scored(tmp_path, "mmbench", [row for row in rows if row["index"] != 1_000_000])["rules"]["strict"]
    assert (without["circular"], without["vanilla"]) == (0.0, pytest.approx(2 / 3))  # question 0 lacks a pass
    unknown = scored(tmp_path, "mmbench", [row | {"index": -1 - k} for k, row in enumerate(rows)])
    assert "circular" not in unknown["rules"]["strict"]  # numbers of no pass
    whole = [row | {"question": "Which?\nA. x\nB. y\nC. z"} for row in rows]
    assert scored(tmp_path, "mmbench", whole)["rules"]["strict"]["circular"] == 0.0  # three options, two passes


@pytest.mark.parametrize(("index", "circular"), [(999_999, False), (1_000_000, True), (2_000_003, True)])
def test_one_row_of_a_later_pass_asks_for_all(index: int, circular: bool) -> None:
    found = [take_apart(image_row(number, "1.jpg", "?", "A", "A")) for number in (3, index)]
    assert BENCHMARKS["mmbench"].options_for(found)["circular"] is circular


# ---- MMAU, AIR-Bench -------------------------------------------------------------------------------------------------


def test_mmau_string_match(tmp_path: Path) -> None:
    choices = ["Old man", "Young man", "Woman"]
    said = {"old man": (1, 1), "The old man!": (1, 1), "A": (1, 0), "(A) Old man": (1, 1), "man": (0, 0), "": (0, 0)}
    said["an old and a young man"] = (0, 0)
    rows = [
        {"id": str(i), "audio_id": f"{i}.wav", "question": "Who?", "choices": choices, "answer": "Old man"}
        | {"task": "speech" if i % 2 else "music", "model_output": text}
        for i, text in enumerate(said)
    ]
    result = scored(tmp_path, "mmau", rows)
    assert result["rules"]["strict"]["score"] == pytest.approx(sum(a for a, _ in said.values()) / 7)
    assert result["rules"]["official"]["score"] == pytest.approx(sum(b for _, b in said.values()) / 7)
    assert result["rules"]["strict"]["task"]["music"]["rows"] == 4


def test_mmau_matches_the_words_of_the_answer_as_it_is_written(tmp_path: Path) -> None:
    """Published rows, with and without annotations; eval/run.py's rows of today, and old ones with the letter only."""
    record = {"id": "1", "audio_id": "1.wav", "question": "?", "choices": ["Presto", "Lento", "Andante"]}
    record |= {"answer": "(C) Andante", "task": "music", "difficulty": "easy"}
    annotations = tmp_path / "mmau.json"
    annotations.write_text(json.dumps([record]))
    mmau = BENCHMARKS["mmau"]
    (own,) = mmau.load(annotations)
    for said, right in (("andante", 0), ("c andante", 1)):
        published = [record | {"model_output": said}]
        own.prediction = said
        now = mmau.to_json(own)
        for rows, truths in ((published, None), (published, annotations), ([now], None)):
            assert scored(tmp_path, "mmau", rows, truths)["rules"]["official"]["score"] == right
        plain = now | {"meta": {"choices": record["choices"]}}
        assert scored(tmp_path, "mmau", [plain], None)["rules"]["official"]["score"] == 1


@pytest.mark.parametrize(("truth", "letter"), [("C", "B"), ("G", "C")])
@pytest.mark.parametrize("name", ["mmau", "air_bench"])
def test_true_answers_of_one_character_are_texts(tmp_path: Path, name: str, truth: str, letter: str) -> None:
    options = ["D", "C", "G", "A"]
    letters = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), options, strict=True))
    record = {"question": "Which note?", "task_name": "Music_Midi_Pitch_Analysis", "dataset_name": "n", "path": "1.wav"}
    record |= letters | {"id": "1", "uniq_id": 1, "audio_id": "1.wav", "choices": options}
    record |= {"answer": truth} if name == "mmau" else {"answer_gt": truth}
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps([record]))
    (row,) = BENCHMARKS[name].load(annotations, options={"tasks": "all"} if name == "air_bench" else {})
    assert row.answer == letter
    row.prediction = letter
    own, published = BENCHMARKS[name].to_json(row), record | {"model_output": letter}
    for rows, truths in (([own], None), ([published], None), ([published], annotations if name == "mmau" else None)):
        assert scored(tmp_path, name, rows, truths)["score"] == 1.0


def test_air_bench_by_the_publishers_scorer(tmp_path: Path) -> None:
    said = ["B", "B. sad", "The answer is B.", "sad", "None", "", "happy", "I feel it", "Angry"]
    said += [" B", "It is\nB\n.", "A or B.", "X", "D. neither"]
    rows = [
        {"path": f"{i}.wav", "question": "Which mood?", "choice_a": "happy", "choice_b": "sad", "choice_c": None}
        | {
            "answer_gt": "sad",
            "task_name": "Speaker_Emotion_Recontion",
            "dataset_name": "x",
            "uniq_id": i,
            "response": text,
        }
        for i, text in enumerate(said)
    ]
    result = scored(tmp_path, "air_bench", rows)
    # the script reads B B B - - - - - A B B A - D: eight rows are left
    official, strict = result["rules"]["official"], result["rules"]["strict"]
    assert official["score"] == pytest.approx(5 / 8)
    assert strict["score"] == pytest.approx(5 / 14)
    assert official["unparsed"] == 6
    assert official["task_name"]["Speaker_Emotion_Recontion"] == {"rows": 8, "accuracy": 5 / 8}
    assert strict["task_name"]["Speaker_Emotion_Recontion"] == {"rows": 14, "accuracy": 5 / 14}
