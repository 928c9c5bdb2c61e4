"""The text that the miniature LLM is trained on: worlds told in words, questions about them, and words spelled out.

A document is a conversation: the first user turn tells a scene, either as captions ("a red circle on the left. flute from
2 to 5.") or as a time line ("red circle left | ... flute drum | flute | none"), and each turn asks for an answer or a
caption. Other documents spell letter by letter, with letters doubled or lost as an ear would: sentences to be written down;
or names to be found, and questions to be answered, in a told scene, several to a document, since a question's answer is
one word to learn from. Notes say one scene over and over, things and attributes in changing
order: nearly every word can be looked up, so that looking up, on which every question depends, is learned in the first
minutes (without notes it was not in forty). The wordings of the questions are those of `Kind.base` only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from data.miniworld.ask import AVQA, IMAGES, SPOKEN, Kind, Question, questions
from data.miniworld.scene import PLAYED_BY, SECONDS, WORLD, Scene, Sound, Vocabulary, sample_scene
from data.miniworld.tell import in_reading_order, tell_picture, tell_scene, tell_sentence, tell_sound, tell_sounds

DESCRIBE_PICTURE = "Describe the picture."
DESCRIBE_SOUND = "Describe the sound."
TRANSCRIBE = "Write down what is said."
NOTE = "Notes."
FIND = "Find."
LEAD_INS = ("", "", "", "hey ", "so ", "well ", "tell me ", "answer me ", "i ask ", "do say ")
EASY = {"audio_counting", "visual_counting", "things", "sounds"}  # learned long before the others: asked less
Turns = list[tuple[str, str]]  # (user, assistant)


def tell_frames(scene: Scene, rng: np.random.Generator) -> str:
    """What is seen at 3, 5 or 10 moments, evenly spread."""
    n = (3, 5, 10)[rng.choice(3, p=(0.7, 0.25, 0.05))]
    moments = []
    for i in range(n):
        second = (i + 0.5) * SECONDS / n
        seen = [t for t in scene.things if t.enter <= second < t.leave]
        order = rng.permutation(len(seen))
        moments.append(", ".join(f"{seen[i].colour} {seen[i].shape} {seen[i].column}" for i in order) or "none")
    return " | ".join(moments)


def tell_windows(scene: Scene, rng: np.random.Generator) -> str:
    """What is heard in each of the ten seconds."""
    windows = []
    for second in range(SECONDS):
        heard = [s.instrument for s in scene.sounds if s.start <= second < s.end]
        windows.append(" ".join(heard[i] for i in rng.permutation(len(heard))) or "none")
    return " | ".join(windows)


def spell(text: str, rng: np.random.Generator) -> str:
    """The text letter by letter, some letters doubled, a few lost."""
    letters: list[str] = []
    for letter in text.lower():
        if letter.isalpha() or letter == " ":
            draw = rng.random()
            times = 0 if draw < 0.04 else 2 if draw < 0.25 else 1
            letters += ["_" if letter == " " else letter] * times
    return " ".join(letters)


def _new_word(rng: np.random.Generator) -> str:
    return "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in rng.integers(26, size=rng.integers(3, 8)))


def _spelled(rng: np.random.Generator, vocabulary: Vocabulary) -> Turns:
    words = tell_sentence(rng, vocabulary).split()
    words = [_new_word(rng) if rng.random() < 0.12 else word for word in words]
    sentence = " ".join(words)
    return [(f"{spell(sentence, rng)} {TRANSCRIBE}", sentence)]


def _spelled_turns(rng: np.random.Generator, vocabulary: Vocabulary) -> Turns:
    """A scene told in captions, then spelled questions about it, and spelled names of what is to be found in it."""
    scene = sample_scene(rng, vocabulary)
    asked = _shuffled(rng, [q for _ in range(2) for q in _asked(scene, SPOKEN, rng, vocabulary)])
    asked = [question for question in asked if question.kind not in EASY or rng.random() < 0.4]
    turns = [
        (f"{spell(LEAD_INS[rng.integers(len(LEAD_INS))] + question.text, rng)} Answer.", question.answer)
        for question in asked[: rng.integers(1, 6)]
    ]
    names = _shuffled(rng, list(_names(scene)))[: rng.integers(0, 5)]
    turns += [(f"{spell(name, rng)} {FIND}", found) for name, found in names]
    turns = _shuffled(rng, turns)
    return [(f"{tell_scene(scene)} {turns[0][0]}", turns[0][1]), *turns[1:]] if turns else _spelled(rng, vocabulary)


def _names(scene: Scene) -> Iterator[tuple[str, str]]:
    """Words of the scene, and all that bears each."""
    things = in_reading_order(scene.things)
    words = dict.fromkeys(word for thing in things for word in (thing.colour, thing.shape, thing.column))
    for word in words:
        bearers = [thing for thing in things if word in (thing.colour, thing.shape, thing.column)]
        yield word, ", ".join(f"{thing.colour} {thing.shape} {thing.column}" for thing in bearers)
    for sound in scene.sounds:
        yield sound.instrument, tell_sound(sound)


def _captions(scene: Scene) -> Turns:
    return [(DESCRIBE_PICTURE, tell_picture(scene)), (DESCRIBE_SOUND, tell_sounds(scene))]


def _shuffled(rng: np.random.Generator, items: list) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _notes(rng: np.random.Generator, vocabulary: Vocabulary, timeline: float) -> Turns:
    """Notes of a scene, half of the time after it was told."""
    scene = sample_scene(rng, vocabulary)
    prompt = f"{' '.join(_tell(scene, rng, rng.random() < timeline))} {NOTE}" if rng.random() < 0.5 else NOTE
    things = [(thing.colour, thing.shape, thing.column) for thing in scene.things]
    return [(prompt, "; ".join([_thing_line(_shuffled(rng, things)), *note_lines(scene, rng)]))]


def note_lines(scene: Scene, rng: np.random.Generator, *, sounds: bool = True) -> list[str]:
    """What is seen, one to three times, things and attributes in changing order; what is heard, up to twice."""
    things = [(thing.colour, thing.shape, thing.column) for thing in scene.things]
    lines = []
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.3:
            lines.append(tell_picture(scene).rstrip("."))
        else:
            lines.append(_thing_line([tuple(_shuffled(rng, list(thing))) for thing in _shuffled(rng, things)]))
    heard = [_note_sound(scene, sound) for sound in scene.by_start]
    for _ in range(rng.integers(0, 3) if sounds else 0):
        lines.append(", ".join(heard if rng.random() < 0.5 else _shuffled(rng, heard)))
    return lines


def _thing_line(things: list[tuple[str, ...]]) -> str:
    return ", ".join(" ".join(words) for words in things)


def _note_sound(scene: Scene, sound: Sound) -> str:
    shape = PLAYED_BY[sound.instrument]
    thing = scene.thing(shape)
    place = thing.column if thing else "outside"
    return f"{sound.instrument} of {shape} {place} {sound.start} to {sound.end} lasts {sound.duration}"


def _tell(scene: Scene, rng: np.random.Generator, in_time: bool) -> tuple[str, str]:
    """What is seen and what is heard: a time line, or captions."""
    if in_time:
        return tell_frames(scene, rng), tell_windows(scene, rng)
    return tell_picture(scene), tell_sounds(scene)


def _asked(scene: Scene, kinds: dict[str, Kind], rng: np.random.Generator, vocabulary: Vocabulary) -> list[Question]:
    """Questions in the base's wordings that name nothing beyond its vocabulary."""
    new = {*WORLD.shapes, *WORLD.colours} - {*vocabulary.shapes, *vocabulary.colours}
    found = questions(scene, kinds, rng, base=True)
    return [question for question in found if not new & set(re.findall("[a-z]+", question.text))]


def _loosely(text: str, rng: np.random.Generator) -> str:
    """The question as it is, or, one time in four, without capital and mark."""
    return text.lower().rstrip("?.") if rng.random() < 0.25 else text


def _lengths(scene: Scene) -> Turns:
    return [(f"How long does the {sound.instrument} sound?", str(sound.duration)) for sound in scene.sounds]


def told(rng: np.random.Generator, vocabulary: Vocabulary, timeline: float = 0.6) -> Turns:
    """A scene told in words, questions about it and, for a time line (that share of all), its captions."""
    scene = sample_scene(rng, vocabulary)
    in_time = rng.random() < timeline
    seen, heard = _tell(scene, rng, in_time)
    asked = [q for _ in range(2) for kinds in (AVQA, SPOKEN, IMAGES) for q in _asked(scene, kinds, rng, vocabulary)]
    asked = [question for question in asked if question.kind not in EASY or rng.random() < 0.15]
    turns = [(_loosely(question.text, rng), question.answer) for question in _shuffled(rng, asked)[:14]]
    turns += _shuffled(rng, _lengths(scene))[:2]
    if in_time:
        turns += _captions(scene)
    turns = _shuffled(rng, turns)
    return [(f"{seen} {heard} {turns[0][0]}", turns[0][1]), *turns[1:]]


def document(rng: np.random.Generator, vocabulary: Vocabulary, progress: float = 1.0) -> Turns:
    """One conversation about one scene or one sentence; `progress`, in [0, 1], says how far the training is.

    First notes and short captions only, from which looking up is learned; then everything.
    """
    draw = rng.random()
    if progress < 0.12:
        return _notes(rng, vocabulary, timeline=0.0) if draw < 0.5 else told(rng, vocabulary, timeline=0.0)
    if draw < 0.2:
        return _notes(rng, vocabulary, timeline=0.6)
    if draw < 0.28:
        return _spelled(rng, vocabulary)
    if draw < 0.48:
        return _spelled_turns(rng, vocabulary)
    return told(rng, vocabulary)


def corpus(n: int, vocabulary: Vocabulary, seed: int) -> list[str]:
    """n documents as plain text, to train the tokenizer on."""
    rng = np.random.default_rng(seed)
    return [f"{user} {assistant}" for _ in range(n) for user, assistant in document(rng, vocabulary)]
