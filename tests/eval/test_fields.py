"""What a row of a predictions file says, under the names that each of its writers gives it."""

from __future__ import annotations

from typing import Any

import pytest

from eval.benchmarks.fields import take_apart


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"id": "i", "prediction": "p", "answer": "t", "unit": "u", "meta": {"question": "x"}}, "pti--"),
        ({"rank": 0, "index": 1, "image_path": "m", "question": "q", "answer": "t", "output": ["p"]}, "pt-mq"),
        ({"instruction": "q", "output": "t</s>", "video_path": "m", "predict": "p"}, "pt-mq"),
        ({"output": "t</s>\n", "question_type": ["Audio", "Counting"], "predict": "p"}, "pt---"),
        ({"id": "i", "audio_id": "m", "question": "q", "answer": "t", "model_output": "p"}, "ptimq"),
        ({"id": "i", "audio_id": "m", "question": "q", "answer": "t", "model_prediction": "p"}, "ptimq"),
        ({"path": "m", "question": "q", "answer_gt": "t", "uniq_id": 5, "response": "p"}, "pt5mq"),
        ({"audio_filepath": "m", "text": "t", "pred_text": "p"}, "pt-m-"),
        ({"question_id": 7, "prompt": "q", "text": "p"}, "p-7-q"),
        ({"question_id": 7, "video_id": "m", "question_content": "q", "anser": "t", "predict": "p"}, "pt7mq"),
        ({"key": "i", "source": "m", "prompt": "q", "target": "t", "response": "p"}, "ptimq"),
        ({"image_id": 8, "reference": "t", "caption": "p"}, "pt-8-"),
        ({"data_id": "m", "question": "q", "ground_truth": "t", "output": ["p"]}, "pt-mq"),
        ({"wav": "m", "label": "t", "output": "p"}, "pt-m-"),
        # of two names the first, of two truths the first that is not empty
        ({"predict": "x", "prediction": "p", "transcript": "x", "text": "t"}, "pt---"),
        ({"text": "t", "output": "p", "path": "x", "wav": "m", "instruction": "x", "question": "q"}, "pt-mq"),
        ({"answer_gt": "x", "answer": "t", "output": "p", "question_id": "x", "id": "i"}, "pti--"),
        ({"answer": "", "label": "t", "output": "p", "image": None, "path": "m"}, "pt-m-"),
    ],
)
def test_each_writers_names(record: dict[str, Any], expected: str) -> None:
    fields = take_apart(record)
    found = (fields.prediction, fields.truth, fields.id, fields.media, fields.question)
    assert ("".join(part or "-" for part in found), fields.error) == (expected, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (["a", "b"], "a"),
        ([], ""),
        (None, ""),
        (3, "3"),
        (2.5, "2.5"),
        (True, "True"),
        ({}, None),
        ([{}], None),
    ],
)
def test_values_that_are_texts(value: Any, text: str | None) -> None:
    fields = take_apart({"predict": value, "answer": value})
    assert (fields.prediction, fields.truth, fields.readable) == (text or "", text or "", True)
    assert (fields.error is None) == (text is not None)


def test_end_marks_are_no_part_of_a_true_answer() -> None:
    assert take_apart({"output": " two</s> </s>", "predict": "two</s>"}).truth == "two"


@pytest.mark.parametrize(
    ("record", "told"),
    [({"text": "", "pred_text": "p"}, True), ({"text": None, "pred_text": "p"}, False), ({"text": "p"}, False)],
)
def test_an_empty_true_answer_is_one(record: dict[str, Any], told: bool) -> None:
    assert take_apart(record).has_truth is told


def test_rows_of_ones_own() -> None:
    own = {"id": "i", "index": 3, "prediction": "p", "answer": "t", "unit": "u", "meta": {"a": 1}, "error": "broken"}
    fields = take_apart(own)
    assert (fields.own, fields.unit, fields.index, fields.meta, fields.error) == (True, "u", 3, {"a": 1}, "broken")
    strange = take_apart(own | {"index": True, "unit": {}, "meta": [1], "prediction": {}})
    assert (strange.unit, strange.index, strange.meta, strange.error) == ("", None, {}, "broken")
    published = take_apart({"index": 3, "rank": 1, "output": "p", "answer": "t", "unit": "u"})
    assert (published.own, published.unit, published.rank) == (False, "", 1)
    assert published.meta == {"index": 3, "rank": 1, "answer": "t", "unit": "u"}


def test_rows_about_the_same_have_one_content() -> None:
    row = {"question_id": 1, "image": "m", "question": "q", "answer": "t", "choices": ["a", "b"]}
    content = take_apart(row | {"output": "p", "index": 1, "rank": 0}).content
    assert take_apart(dict(reversed(row.items())) | {"output": "other", "index": 2, "rank": 1}).content == content
    for key in row:
        assert take_apart(row | {"output": "p", key: "other"}).content != content
    choices = {"A": "a", "B": "b"}  # of an object, in whatever order
    one, same = (take_apart(row | {"choices": dict(pairs)}) for pairs in (choices.items(), reversed(choices.items())))
    assert one.content == same.content
