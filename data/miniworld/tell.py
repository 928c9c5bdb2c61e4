"""A scene in words: captions, and the plain sentences that are spoken for transcription.

Captions name what is seen from left to right and what is heard in the order of its start; times are whole seconds and are
left out where they span the whole clip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from data.miniworld.scene import COLUMNS, PLAYS, SECONDS, WORLD, Scene, Sound, Thing, Vocabulary

COLUMN_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}


def span(start: int, end: int) -> str:
    return "" if (start, end) == (0, SECONDS) else f" from {start} to {end}"


def tell_thing(thing: Thing) -> str:
    return f"a {thing.colour} {thing.shape} {COLUMN_WORDS[thing.column]}{span(thing.enter, thing.leave)}"


def tell_sound(sound: Sound) -> str:
    return f"{sound.instrument}{span(sound.start, sound.end)}"


def in_reading_order(things: Iterable[Thing]) -> list[Thing]:
    """From left to right, and from top to bottom."""
    return sorted(things, key=lambda thing: (COLUMNS.index(thing.column), thing.row != "top"))


def tell_picture(scene: Scene) -> str:
    return ", ".join(map(tell_thing, in_reading_order(scene.things))) + "."


def tell_sounds(scene: Scene) -> str:
    return ", ".join(map(tell_sound, scene.by_start)) + "."


def tell_scene(scene: Scene) -> str:
    """Both captions: all that the text questions ask about."""
    return f"{tell_picture(scene)} {tell_sounds(scene)}"


_SUBJECTS = ("the {colour} {shape}", "a {colour} {shape}", "the {shape} on the {column}", "one {colour} {shape}")
_ACTS = (
    "moves to the {column}",
    "plays the {instrument}",
    "comes after the {other}",
    "is {number} times seen",
    "is the {number} that starts {when}",
    "makes a sound from off the screen",
    "is heard but not seen",
    "has the colour {colour2}",
    "stands in the {column}",
    "knows how many shapes are there",
    "counts the instruments that are heard",
    "tells me which instrument starts {when}",
    "shows where the {other} is",
    "knows on which side the {other} is",
    "asks what colour the {other} has",
    "tells me the colour of the {other}",
    "sounds {how} than the {instrument}",
)


def tell_sentence(rng: np.random.Generator, vocabulary: Vocabulary = WORLD) -> str:
    """A statement in the world's words, to be spoken and transcribed."""

    def one(items: tuple[str, ...]) -> str:
        return items[rng.integers(len(items))]

    words = {
        "shape": one(vocabulary.shapes),
        "other": one(vocabulary.shapes),
        "colour": one(vocabulary.colours),
        "colour2": one(vocabulary.colours),
        "instrument": PLAYS[one(vocabulary.shapes)],
        "column": one(COLUMNS),
        "number": one(("one", "two", "three", "four")),
        "when": one(("first", "last")),
        "how": one(("longer", "louder", "shorter")),
    }
    return f"{one(_SUBJECTS)} {one(_ACTS)}".format(**words)


def split_of(sentence: str) -> str:
    """The only split in which a sentence may occur, by its hash: test and validation one in eight each."""
    bucket = hashlib.sha256(sentence.encode()).digest()[0] % 8
    return {0: "test", 1: "validation"}.get(bucket, "train")
