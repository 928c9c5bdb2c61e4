"""The text that the miniature LLM is trained on: worlds told in words, questions about them, and words spelled out.

A document is a conversation: the first user turn tells a scene, either as captions ("a red circle on the left. flute from
2 to 5.") or as a time line ("red circle left | ... flute drum | flute | none"), and each turn asks for an answer or a
caption. Other documents spell a sentence letter by letter, with letters doubled or lost as an ear would, and ask for the
words, or for the answer to a question so spelled. The wordings of the questions are those of `Kind.base` only.
"""

from __future__ import annotations

import numpy as np

from data.miniworld.ask import AVQA, IMAGES, SPOKEN, questions
from data.miniworld.scene import SECONDS, Scene, Vocabulary, sample_scene
from data.miniworld.tell import tell_picture, tell_scene, tell_sentence, tell_sounds

DESCRIBE_PICTURE = "Describe the picture."
DESCRIBE_SOUND = "Describe the sound."
TRANSCRIBE = "Write down what is said."
EASY = {
    "audio_counting",
    "visual_counting",
    "things",
    "sounds",
    "temporal",
}  # learnt long before the others: asked less
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
    found = questions(scene, SPOKEN, rng, base=True)
    question = found[rng.integers(len(found))]
    return [(f"{tell_scene(scene)} {spell(question.text, rng)} Answer.", question.answer)]


def _captions(scene: Scene) -> Turns:
    return [(DESCRIBE_PICTURE, tell_picture(scene)), (DESCRIBE_SOUND, tell_sounds(scene))]


def told(rng: np.random.Generator, vocabulary: Vocabulary) -> Turns:
    """A scene told in words, questions about it and, for a time line, its captions."""
    scene = sample_scene(rng, vocabulary)
    form = rng.random()
    seen = tell_frames(scene, rng) if form < 0.6 else tell_picture(scene)
    heard = tell_windows(scene, rng) if form < 0.6 else tell_sounds(scene)
    asked = questions(scene, AVQA, rng, base=True) + questions(scene, SPOKEN, rng, base=True)
    asked += questions(scene, IMAGES, rng, base=True)
    asked = [question for question in asked if question.kind not in EASY or rng.random() < 0.3]
    turns = [(question.text, question.answer) for question in asked]
    turns = [turns[i] for i in rng.permutation(len(turns))[:10]]
    if form < 0.6:
        turns += _captions(scene)
    turns = [turns[i] for i in rng.permutation(len(turns))]
    return [(f"{seen} {heard} {turns[0][0]}", turns[0][1]), *turns[1:]]


def document(rng: np.random.Generator, vocabulary: Vocabulary) -> Turns:
    """One conversation about one scene or one sentence."""
    draw = rng.random()
    if draw < 0.12:
        return _spelled(rng, vocabulary)
    if draw < 0.2:
        return _spelled_question(rng, vocabulary)
    return told(rng, vocabulary)


def corpus(n: int, vocabulary: Vocabulary, seed: int) -> list[str]:
    """n documents as plain text, to train the tokenizer on."""
    rng = np.random.default_rng(seed)
    return [f"{user} {assistant}" for _ in range(n) for user, assistant in document(rng, vocabulary)]
