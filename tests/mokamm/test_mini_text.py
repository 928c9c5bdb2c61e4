"""The text that the miniature LLM is trained on: nothing that stage 2 keeps new, true answers, notes that repeat."""

from __future__ import annotations

import re

import numpy as np
import pytest

from data.miniworld.ask import AVQA, IMAGES
from data.miniworld.scene import BASE, COLUMNS, PLAYS, WORLD
from mokamm.mini.text import NOTE, corpus, document, told

NEW = {"diamond", "horn", "orange", "cyan"}


def test_the_base_never_meets_what_stage_2_keeps_new() -> None:
    text = " ".join(corpus(600, BASE, seed=3)).lower()
    assert not NEW & set(re.findall("[a-z]+", text))
    assert {*BASE.shapes, *BASE.colours, *COLUMNS} <= set(re.findall("[a-z]+", text))
    for kind in (*AVQA.values(), *IMAGES.values()):
        for wording in kind.wordings:
            asked = re.sub(r"\\\{\w\\\}", r"\\w+", re.escape(wording.lower()))
            assert not re.search(asked, text), wording
    assert re.search(r"where is the \w+\?", text)  # the same search finds a wording of the base


def test_new_things_are_in_the_world() -> None:
    assert {*WORLD.shapes, *WORLD.colours, *PLAYS.values()} >= NEW


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_documents_are_a_function_of_the_generator(progress: float) -> None:
    one, two = ([document(np.random.default_rng([5, i]), BASE, progress) for i in range(40)] for _ in range(2))
    assert one == two


def test_training_begins_with_notes_and_captions() -> None:
    rng = np.random.default_rng(0)
    early = [document(rng, BASE, 0.0) for _ in range(200)]
    assert 0.4 < sum(turns[0][0].endswith(NOTE) for turns in early) / len(early) < 0.6
    assert not any("|" in turns[0][0] for turns in early)  # no time lines yet


def test_every_line_of_notes_tells_the_same_scene() -> None:
    rng, seen = np.random.default_rng(1), 0
    for _ in range(300):
        turns = document(rng, BASE, 0.0)
        if not turns[0][0].endswith(NOTE):
            continue
        lines = [line for line in turns[0][1].split("; ") if "lasts" not in line]
        words = [sorted(set(re.findall("[a-z]+", line)) & {*BASE.shapes, *BASE.colours, *COLUMNS}) for line in lines]
        assert all(line == words[0] for line in words)
        for name, start, end, length in re.findall(r"([a-z]+) (\d+) to (\d+) lasts (\d+)", turns[0][1]):
            assert int(end) - int(start) == int(length), name
        seen += 1
    assert seen > 100


def test_answers_about_a_told_scene_stand_in_its_words() -> None:
    """Colours and places by another way: read off the caption."""
    rng, asked = np.random.default_rng(2), 0
    for _ in range(200):
        turns = told(rng, BASE, timeline=0.0)
        scene = turns[0][0]
        for question, answer in turns:
            if found := re.search(r"What colour is the (\w+)\?", question):
                assert f"a {answer} {found[1]} " in scene
                asked += 1
            if found := re.search(r"Where is the (\w+)\?", question):
                assert re.search(rf"{found[1]} (on|in) the {answer}\b", scene)
                asked += 1
    assert asked > 100
