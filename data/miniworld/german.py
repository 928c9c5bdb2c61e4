"""The audio-visual questions in German, a language that the miniature base has never met.

The same clips, questions and answers as in English, so that the two differ by language alone: in English stage 2 brings
little that is new to the LLM, in German nearly every word. Nouns come with their articles, as subjects of the sentence.
"""

from __future__ import annotations

from dataclasses import replace

from data.miniworld.ask import Question

WORDS = {
    "circle": "der Kreis", "square": "das Quadrat", "triangle": "das Dreieck", "star": "der Stern",
    "cross": "das Kreuz", "ring": "der Ring", "diamond": "die Raute",
    "flute": "die Flöte", "drum": "die Trommel", "bell": "die Glocke", "violin": "die Geige",
    "organ": "die Orgel", "guitar": "die Gitarre", "horn": "das Horn",
    "left": "links", "middle": "Mitte", "right": "rechts", "outside": "außerhalb",
    "first": "zuerst", "last": "zuletzt", "yes": "ja", "no": "nein",
    "zero": "null", "one": "eins", "two": "zwei", "three": "drei", "four": "vier",
}  # fmt: skip
WORDINGS = {  # in the order of the kind's English ones
    "audio_counting": ("Wie viele Instrumente sind zu hören?", "Wie groß ist die Zahl der Instrumente?"),
    "audio_comparative": ("Spielt {a} länger als {b}?", "Ist {a} länger zu hören als {b}?"),
    "visual_counting": ("Wie viele Formen sind im Video zu sehen?", "Wie groß ist die Zahl der Formen?"),
    "visual_location": ("Wo im Video ist {a}?", "Auf welcher Seite erscheint {a}?"),
    "av_existential": ("Ist {a} zu sehen und zu hören?", "Macht {a} im Video ein Geräusch?"),
    "av_counting": ("Wie viele Formen im Video klingen?", "Von wie vielen Formen kommt ein Geräusch?"),
    "av_location": ("Wo ist die Form, die {a} klingt?", "Woher kommt das Geräusch, das {a} beginnt?"),
    "av_comparative": ("Klingt die Form {a} länger als die Form {b}?", "Dauert das Geräusch {a} länger als {b}?"),
    "av_temporal": ("Welche Form im Video klingt {a}?", "Welche der Formen beginnt {a}?"),
}


def in_german(question: Question) -> Question:
    """An audio-visual question in the world's wordings, said in German; answers go without an article."""
    blanks = {name: WORDS[word] for name, word in question.blanks.items()}
    text = WORDINGS[question.kind][question.wording].format(**blanks)
    return replace(question, text=text, answer=WORDS[question.answer].split()[-1])
