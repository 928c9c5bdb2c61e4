"""The text that the miniature LLM is trained on: nothing that stage 2 keeps new, true answers, notes that repeat."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.miniworld.ask import AVQA, IMAGES
from data.miniworld.german import WORDINGS, WORDS
from data.miniworld.scene import BASE, COLUMNS, PLAYS, WORLD, sample_scene
from mokamm.mini import captions
from mokamm.mini.text import FIND, NOTE, corpus, document, note_lines, told

NEW = {"diamond", "horn", "orange", "cyan"}


def test_the_base_never_meets_what_stage_2_keeps_new() -> None:
    text = " ".join(corpus(600, BASE, seed=3)).lower()
    assert not NEW & set(re.findall("[a-z]+", text))
    assert {*BASE.shapes, *BASE.colours, *COLUMNS} <= set(re.findall("[a-z]+", text))
    for kind in (*AVQA.values(), *IMAGES.values()):
        for wording in kind.wordings:
            asked = re.sub(r"\\\{\w\\\}", r"\\w+", re.escape(wording.lower()))
            assert not re.search(asked, text), wording
    german = set(" ".join((*WORDS.values(), *(text for pair in WORDINGS.values() for text in pair))).lower().split())
    assert len(german) > 60
    assert german & set(re.findall(r"\w+", text)) <= {"ring", "video"}
    assert re.search(r"where is the \w+\?", text)  # the same search finds a wording of the base


def test_new_things_are_in_the_world() -> None:
    assert {*WORLD.shapes, *WORLD.colours, *PLAYS.values()} >= NEW


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_documents_are_a_function_of_the_generator(progress: float) -> None:
    one, two = ([document(np.random.default_rng([5, i]), BASE, progress) for i in range(40)] for _ in range(2))
    assert one == two


def test_training_begins_with_notes_and_captions() -> None:
    rng = np.random.default_rng(0)
    early = [document(rng, BASE, 0.0) for _ in range(1000)]
    assert 0.45 < sum(turns[0][0].endswith(NOTE) for turns in early) / len(early) < 0.55
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


def test_notes_join_what_is_seen_and_what_is_heard() -> None:
    rng, heard = np.random.default_rng(4), 0
    for _ in range(200):
        scene = sample_scene(rng, BASE)
        columns = {thing.shape: thing.column for thing in scene.things}
        for line in note_lines(scene, rng):
            if "lasts" not in line:
                continue
            told_of = {words.split()[0]: words.split() for words in line.split(", ")}
            assert set(told_of) == {sound.instrument for sound in scene.sounds}
            for instrument, (_, _, shape, place, *_) in told_of.items():
                assert PLAYS[shape] == instrument
                assert place == columns.get(shape, "outside")
            heard += 1
        assert not any("lasts" in line for line in note_lines(scene, rng, sounds=False))
    assert heard > 100


def test_spelled_names_find_all_that_bears_them() -> None:
    """A document with spelled words carries the scene in its first words: the answers are checked against it."""
    rng, found = np.random.default_rng(6), 0
    for _ in range(600):
        turns = document(rng, BASE)
        scene = turns[0][0].split(".")[0]
        for user, answer in turns:
            if user.endswith(FIND) and "from" not in answer and " " in answer:  # not a sound
                for colour, shape, place in (bearer.split() for bearer in answer.split(", ")):
                    assert re.search(rf"a {colour} {shape} (on|in) the {place}\b", scene)
                found += 1
    assert found > 50


def test_stage_1_has_captions_and_transcripts_of_single_and_joint_media_and_no_question() -> None:
    rows = list(captions._rows(4, 2, 3))
    kinds = Counter(tuple(part["type"] for part in row["messages"][0]["content"][:-1]) for row in rows)
    assert kinds == {("video",): 4, ("audio",): 4 + 3, ("video", "audio"): 8, ("image",): 4, ("text", "audio"): 3}
    assert {row["messages"][0]["content"][-1]["text"] for row in rows} == {
        "Describe the picture.", "Describe the sound.", "Notes.", "Write down what is said.",
    }  # fmt: skip
    assert not any("?" in row["messages"][1]["content"] for row in rows)


def test_the_shipped_base_is_small() -> None:
    """At most 16 MB together: it is cloned by everyone."""
    folder = Path(captions.__file__).parent
    weights = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in weights) <= 16_000_000
