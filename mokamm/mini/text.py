"""The text that the miniature LLM is trained on: worlds told in words, questions about them, and words spelled out.

A document is a conversation: the first user turn tells a scene, either as captions ("a red circle on the left. flute from
2 to 5.") or as a time line ("red circle left | ... flute drum | flute | none"), and each turn asks for an answer or a
caption. Other documents spell a sentence letter by letter, with letters doubled or lost as an ear would, and ask for the
words, or for the answer to a question so spelled. Notes say one scene over and over, things and attributes in changing
order: nearly every word can be looked up, so that looking up, on which every question depends, is learned in the first
minutes (without notes it was not in forty). The wordings of the questions are those of `Kind.base` only.
"""

from __future__ import annotations

import numpy as np

from data.miniworld.ask import AVQA, IMAGES, SPOKEN, Kind, Question, questions
from data.miniworld.scene import PLAYED_BY, SECONDS, WORLD, Scene, Sound, Vocabulary, sample_scene
from data.miniworld.tell import in_reading_order, tell_picture, tell_scene, tell_sentence, tell_sounds

DESCRIBE_PICTURE = "Describe the picture."
DESCRIBE_SOUND = "Describe the sound."
TRANSCRIBE = "Write down what is said."
NOTE = "Notes."
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


def _spelled_question(rng: np.random.Generator, vocabulary: Vocabulary) -> Turns:
    scene = sample_scene(rng, vocabulary)
    found = _asked(scene, SPOKEN, rng, vocabulary)
    question = found[rng.integers(len(found))]
    return [(f"{tell_scene(scene)} {spell(question.text, rng)} Answer.", question.answer)]


def _captions(scene: Scene) -> Turns:
    return [(DESCRIBE_PICTURE, tell_picture(scene)), (DESCRIBE_SOUND, tell_sounds(scene))]


def _shuffled(rng: np.random.Generator, items: list) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _notes(rng: np.random.Generator, vocabulary: Vocabulary, timeline: float) -> Turns:
    """One scene said several times over, half of the time after it was told: nearly every word can be looked up."""
    scene = sample_scene(rng, vocabulary)
    prompt = f"{' '.join(_tell(scene, rng, rng.random() < timeline))} {NOTE}" if rng.random() < 0.5 else NOTE
    things = [(thing.colour, thing.shape, thing.column) for thing in scene.things]
    lines = [", ".join(" ".join(thing) for thing in _shuffled(rng, things))]
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.3:
            lines.append(tell_picture(scene).rstrip("."))
        else:
            lines.append(", ".join(" ".join(_shuffled(rng, list(thing))) for thing in _shuffled(rng, things)))
    sounds = [_note_sound(scene, sound) for sound in scene.by_start]
    lines += [", ".join(sounds if rng.random() < 0.5 else _shuffled(rng, sounds)) for _ in range(rng.integers(0, 3))]
    return [(prompt, "; ".join(lines))]


def tell_notes(scene: Scene) -> str:
    """What is seen, from left to right, and what is heard, in the order of its start, with whose it is and where."""
    seen = ", ".join(f"{thing.colour} {thing.shape} {thing.column}" for thing in in_reading_order(scene.things))
    return f"{seen}; {', '.join(_note_sound(scene, sound) for sound in scene.by_start)}"


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
    return [question for question in found if not new & set(question.text.rstrip("?").split())]


def told(rng: np.random.Generator, vocabulary: Vocabulary, timeline: float = 0.6) -> Turns:
    """A scene told in words, questions about it and, for a time line (that share of all), its captions."""
    scene = sample_scene(rng, vocabulary)
    in_time = rng.random() < timeline
    seen, heard = _tell(scene, rng, in_time)
    asked = [q for _ in range(2) for kinds in (AVQA, SPOKEN, IMAGES) for q in _asked(scene, kinds, rng, vocabulary)]
    asked = [question for question in asked if question.kind not in EASY or rng.random() < 0.15]
    turns = [(question.text, question.answer) for question in _shuffled(rng, asked)[:14]]
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
    if draw < 0.3:
        return _spelled(rng, vocabulary)
    if draw < 0.38:
        return _spelled_question(rng, vocabulary)
    return told(rng, vocabulary)


def corpus(n: int, vocabulary: Vocabulary, seed: int) -> list[str]:
    """n documents as plain text, to train the tokenizer on."""
    rng = np.random.default_rng(seed)
    return [f"{user} {assistant}" for _ in range(n) for user, assistant in document(rng, vocabulary)]
