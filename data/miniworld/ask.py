"""Questions about a scene and their answers, in MUSIC-AVQA's nine types, as spoken questions, and about images.

A kind of question is a function from a scene to candidates (subject, answer). `Balance` picks among the candidates of many
scenes so that, for every wording and subject, the answers are equally frequent: the question alone tells nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data.miniworld.scene import COLOURS, COLUMNS, PLAYED_BY, PLAYS, WORLD, Scene

NUMBERS = ("zero", "one", "two", "three", "four")
YES_NO = ("yes", "no")
Candidate = tuple[dict[str, str], str]  # what fills the wording's blanks, and the answer


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of question: MUSIC-AVQA's type, how to find candidates in a scene, all its answers, and its wordings.

    `base` wordings are those the miniature base met in text; `wordings` are asked in the world's own data.
    """

    type: tuple[str, str]
    candidates: Callable[[Scene], Iterable[Candidate]]
    answers: tuple[str, ...]
    base: tuple[str, ...]
    wordings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: a kind's wording with its blanks filled, and the answer."""

    kind: str
    text: str
    answer: str
    wording: int  # which of the kind's
    blanks: dict[str, str]


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _duration(scene: Scene, shape: str) -> int:
    sound = scene.sound_of(shape)
    return sound.duration if sound else 0


def _count_sounds(scene: Scene) -> Iterator[Candidate]:
    yield {}, NUMBERS[len(scene.sounds)]


def _compare_sounds(scene: Scene) -> Iterator[Candidate]:
    for a in scene.sounds:
        for b in scene.sounds:
            if abs(a.duration - b.duration) >= 2:
                yield {"a": a.instrument, "b": b.instrument}, _yes(a.duration > b.duration)


def _count_things(scene: Scene) -> Iterator[Candidate]:
    yield {}, NUMBERS[len(scene.things)]


def _locate_thing(scene: Scene) -> Iterator[Candidate]:
    for thing in scene.things:
        yield {"a": thing.shape}, thing.column


def _seen_and_heard(scene: Scene) -> Iterator[Candidate]:
    shapes = [thing.shape for thing in scene.things] + [PLAYED_BY[sound.instrument] for sound in scene.sounds]
    for shape in dict.fromkeys(shapes):  # not a set: its order would differ from process to process
        yield {"a": shape}, _yes(scene.thing(shape) is not None and scene.sound_of(shape) is not None)


def _count_sounding(scene: Scene) -> Iterator[Candidate]:
    if len(scene.sounding) < 4:
        yield {}, NUMBERS[len(scene.sounding)]


def _locate_sound(scene: Scene) -> Iterator[Candidate]:
    for when, sound in (("first", scene.by_start[0]), ("last", scene.by_start[-1])):
        thing = scene.thing(PLAYED_BY[sound.instrument])
        yield {"a": when}, thing.column if thing else "outside"


def _compare_sides(scene: Scene) -> Iterator[Candidate]:
    sides = {side: [thing for thing in scene.things if thing.column == side] for side in ("left", "right")}
    if all(len(things) == 1 for things in sides.values()):
        for a, b in (("left", "right"), ("right", "left")):
            first, second = (_duration(scene, sides[side][0].shape) for side in (a, b))
            if abs(first - second) >= 2:
                yield {"a": a, "b": b}, _yes(first > second)


def _first_sounding(scene: Scene) -> Iterator[Candidate]:
    order = [PLAYED_BY[s.instrument] for s in scene.by_start if scene.thing(PLAYED_BY[s.instrument])]
    if order and len(scene.sounds) > 1:
        yield {"a": "first"}, order[0]
        yield {"a": "last"}, order[-1]


def _colour_of(scene: Scene) -> Iterator[Candidate]:
    for thing in scene.things:
        yield {"a": thing.shape}, thing.colour


def _shape_at(scene: Scene) -> Iterator[Candidate]:
    for column in COLUMNS:
        here = [thing for thing in scene.things if thing.column == column]
        if len(here) == 1:
            yield {"a": column}, here[0].shape


def _first_instrument(scene: Scene) -> Iterator[Candidate]:
    if len(scene.sounds) > 1:
        yield {"a": "first"}, scene.by_start[0].instrument
        yield {"a": "last"}, scene.by_start[-1].instrument


def _is_there(scene: Scene) -> Iterator[Candidate]:
    """Present combinations, and absent ones made of a colour and a shape that are both there, or one of them."""
    pairs = [(thing.colour, thing.shape) for thing in scene.things]
    for colour, shape in pairs:
        yield {"a": colour, "b": shape}, "yes"
    for _, shape in pairs:
        for colour in COLOURS:
            if (colour, shape) not in pairs:
                yield {"a": colour, "b": shape}, "no"
    for colour in dict.fromkeys(colour for colour, _ in pairs):
        for shape in PLAYS:
            if (colour, shape) not in pairs:
                yield {"a": colour, "b": shape}, "no"


AVQA: dict[str, Kind] = {
    "audio_counting": Kind(
        ("Audio", "Counting"), _count_sounds, NUMBERS[1:],
        ("How many instruments are heard?", "How many sounds are there?", "How many instruments play?",
         "What number of sounds is heard?", "Number of instruments?", "Say how many instruments sound."),
        ("How many instruments sound in the clip?", "What is the number of instruments heard?"),
    ),
    "audio_comparative": Kind(
        ("Audio", "Comparative"), _compare_sounds, YES_NO,
        ("Does the {a} sound longer than the {b}?", "Is the {a} heard longer than the {b}?",
         "Is the {a} longer than the {b}?", "Does the {a} last longer than the {b}?",
         "Say if the {a} is heard longer than the {b}."),
        ("Does the {a} play longer than the {b}?", "Is the sound of the {a} longer than the {b}?"),
    ),
    "visual_counting": Kind(
        ("Visual", "Counting"), _count_things, NUMBERS[1:],
        ("How many shapes are there?", "How many shapes are seen?", "How many shapes does the picture show?",
         "What number of shapes appears?", "Number of shapes?", "Say how many shapes are seen."),
        ("How many shapes appear in the video?", "What is the number of shapes seen?"),
    ),
    "visual_location": Kind(
        ("Visual", "Location"), _locate_thing, COLUMNS,
        ("Where is the {a}?", "On which side is the {a}?", "Where is the {a} seen?", "Which side is the {a} on?",
         "Where in the picture is the {a}?", "Say where the {a} is."),
        ("Where in the video is the {a}?", "Where does the {a} appear?"),
    ),
    "av_existential": Kind(
        ("Audio-Visual", "Existential"), _seen_and_heard, YES_NO,
        ("Is the {a} seen and heard?", "Is there a {a} that makes a sound?", "Is the {a} seen and does it sound?",
         "Is a {a} making a sound in the picture?", "Does the {a} that is seen sound?",
         "Say if the {a} is seen and heard."),
        ("Is the {a} both seen and heard?", "Is the {a} in the video making a sound?"),
    ),
    "av_counting": Kind(
        ("Audio-Visual", "Counting"), _count_sounding, NUMBERS[:4],
        ("How many shapes make a sound?", "How many shapes are heard?", "How many of the shapes sound?",
         "What number of shapes makes a sound?", "Number of shapes that sound?", "Say how many shapes are sounding."),
        ("How many shapes in the video make a sound?", "What is the number of sounding shapes?"),
    ),
    "av_location": Kind(
        ("Audio-Visual", "Location"), _locate_sound, (*COLUMNS, "outside"),
        ("Where is the {a} sound?", "Where does the {a} sound come from?", "Where is the shape that is heard {a}?",
         "On which side is the {a} sound?", "From where does the {a} sound come?", "Say where the {a} sound is."),
        ("Where is the shape that sounds {a}?", "Where in the video is the {a} sound?"),
    ),
    "av_comparative": Kind(
        ("Audio-Visual", "Comparative"), _compare_sides, YES_NO,
        ("Does the {a} shape sound longer than the {b} one?", "Is the {a} shape heard longer than the {b} one?",
         "Does the shape on the {a} last longer than the one on the {b}?",
         "Is the {a} sound longer than the {b} one?", "Say if the {a} shape sounds longer than the {b} one."),
        ("Does the {a} shape play longer than the {b} one?", "Is the sound on the {a} longer than on the {b}?"),
    ),
    "av_temporal": Kind(
        ("Audio-Visual", "Temporal"), _first_sounding, WORLD.shapes,
        ("Which shape sounds {a}?", "Which shape is heard {a}?", "Which of the shapes sounds {a}?",
         "What shape starts {a}?", "Which shape makes a sound {a}?", "Say which shape sounds {a}."),
        ("Which shape in the video sounds {a}?", "Which of the shapes starts {a}?"),
    ),
}  # fmt: skip

SPOKEN: dict[str, Kind] = {
    "colour": Kind(("Spoken", "Colour"), _colour_of, WORLD.colours,
                   ("What colour is the {a}?", "Which colour has the {a}?", "What is the colour of the {a}?",
                    "Colour of the {a}?", "Say what colour the {a} has."),
                   ("what colour is the {a}", "tell me the colour of the {a}")),
    "location": Kind(("Spoken", "Location"), _locate_thing, COLUMNS,
                     AVQA["visual_location"].base, ("where is the {a}", "on which side is the {a}")),
    "things": Kind(("Spoken", "Counting shapes"), _count_things, NUMBERS[1:],
                   AVQA["visual_counting"].base, ("how many shapes are there", "count the shapes")),
    "sounds": Kind(("Spoken", "Counting sounds"), _count_sounds, NUMBERS[1:],
                   AVQA["audio_counting"].base, ("how many instruments are heard", "count the instruments")),
    "shape": Kind(("Spoken", "Shape"), _shape_at, WORLD.shapes,
                  ("Which shape is on the {a}?", "What is on the {a}?", "What shape is seen on the {a}?",
                   "Which shape does the {a} side show?", "Shape on the {a}?", "Say what is on the {a}."),
                  ("which shape is on the {a}", "what stands on the {a}")),
    "temporal": Kind(("Spoken", "Temporal"), _first_instrument, tuple(PLAYS.values()),
                     ("Which instrument sounds {a}?", "Which instrument starts {a}?", "What instrument is heard {a}?",
                      "Which of the instruments plays {a}?", "Say which instrument is {a}."),
                     ("which instrument starts {a}", "tell me which instrument sounds {a}")),
}  # fmt: skip

IMAGES: dict[str, Kind] = {
    "is_there": Kind(("Image", "Object"), _is_there, YES_NO,
                     ("Is there a {a} {b}?", "Is a {a} {b} seen?", "Does the picture show a {a} {b}?",
                      "Is a {a} {b} there?", "Say if there is a {a} {b}."),
                     ("Is there a {a} {b} in the image?",)),
}  # fmt: skip


class Balance:
    """Picks questions scene by scene so that the answers of every (kind, subject) stay within one of each other."""

    def __init__(self, kinds: dict[str, Kind]) -> None:
        self.kinds = kinds
        self.answers: Counter[tuple[str, str, str]] = Counter()  # (kind, subject, answer)
        self.totals: Counter[str] = Counter()

    def _excess(self, kind: str, subject: str, answer: str) -> int:
        """How far an answer is ahead of the rarest of its kind, for this subject and over all subjects."""
        return max(
            self.answers[kind, about, answer]
            - min(self.answers[kind, about, other] for other in self.kinds[kind].answers)
            for about in self._scopes(kind, subject)
        )

    def _scopes(self, kind: str, subject: str) -> tuple[str, ...]:
        # With many answers a scene offers few of them for one subject: there the balance over all subjects must do.
        return (subject, "") if len(self.kinds[kind].answers) <= 4 else ("",)

    def pick(self, scene: Scene, rng: np.random.Generator, n: int) -> list[Question]:
        """At most n questions of different kinds about the scene, the rarest kinds first."""
        chosen: list[Question] = []
        kinds = [list(self.kinds)[i] for i in rng.permutation(len(self.kinds))]
        for name in sorted(kinds, key=lambda kind: self.totals[kind]):
            if len(chosen) < n and (question := self._pick_of(name, scene, rng)):
                chosen.append(question)
        return chosen

    def _pick_of(self, name: str, scene: Scene, rng: np.random.Generator) -> Question | None:
        kind = self.kinds[name]
        candidates = list(kind.candidates(scene))
        best: tuple[int, dict[str, str], str] | None = None
        for i in rng.permutation(len(candidates)):
            blanks, answer = candidates[i]
            excess = self._excess(name, " ".join(blanks.values()), answer)
            if excess <= 1 and (best is None or excess < best[0]):
                best = (excess, blanks, answer)
        if best is None:
            return None
        _, blanks, answer = best
        for about in self._scopes(name, " ".join(blanks.values())):
            self.answers[name, about, answer] += 1
        self.totals[name] += 1
        return _worded(name, kind.wordings, rng, blanks, answer)


def _worded(
    kind: str, wordings: tuple[str, ...], rng: np.random.Generator, blanks: dict[str, str], answer: str
) -> Question:
    chosen = int(rng.integers(len(wordings)))
    return Question(kind, wordings[chosen].format(**blanks), answer, chosen, blanks)


def questions(scene: Scene, kinds: dict[str, Kind], rng: np.random.Generator, *, base: bool) -> list[Question]:
    """One question of every kind that the scene allows, unbalanced: the text that the miniature base is trained on."""
    found = []
    for name, kind in kinds.items():
        candidates = list(kind.candidates(scene))
        if candidates:
            by_answer: dict[str, list[dict[str, str]]] = {}
            for blanks, answer in candidates:
                by_answer.setdefault(answer, []).append(blanks)
            answer = list(by_answer)[rng.integers(len(by_answer))]
            blanks = by_answer[answer][rng.integers(len(by_answer[answer]))]
            found.append(_worded(name, kind.base if base else kind.wordings, rng, blanks, answer))
    return found
