"""MMAU (Sakshi et al. 2024), the thousand questions of test-mini: speech, sound and music.

File, as published (github.com/Sakshi113/MMAU): mmau-test-mini.json, a JSON array of

    {"id": ..., "audio_id": "./test-mini-audios/ID.wav", "question": ..., "choices": ["Man", "Woman", ...],
     "answer": "Woman", "task": "speech"|"sound"|"music", "difficulty": "easy"|"medium"|"hard", ...}

Media folder: the one that holds test-mini-audios/. Recordings of the task speech are heard by the speech encoder where
the option speech_as (default: audio) says so.

    strict     the option that the text chooses, by letter or by its words (choices.py)
    official   the publishers' string match: all words of the true answer, as the file has it ("(C) Andante" has the
               word c, too), stand in the text, and no word that only wrong options have; a letter alone is wrong

The score is over all rows; `task` and `difficulty` have tables of their own. Predictions: the publishers' rows with
"model_output" (or "model_prediction"), or eval/run.py's.

lmms-eval 0.7.3 (task mmau_test_mini) reads capital letters alone and draws one of A to D at random where it finds none (an
option's words, a small letter, no answer): a quarter of these are right, and with fewer than four options it may fail.
Of several letters it takes the last; the A of `A cat` is a letter.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from data.schema import Media, Sample
from data.sources.rows import text_of
from eval.benchmarks.base import Row
from eval.benchmarks.choices import LETTERS
from eval.benchmarks.multiple_choice import MultipleChoice
from eval.benchmarks.questions import record_of


class Mmau(MultipleChoice):
    name = "mmau"
    categories: ClassVar[tuple[str, ...]] = ("task", "difficulty")
    texts_are_true = True
    home = (
        "get mmau-test-mini.json and its recordings from github.com/Sakshi113/MMAU, name the first as the path and the "
        "folder that holds test-mini-audios/ as the media folder"
    )

    def prompt(self, record: Any, index: int, *, speech_as: str = "audio") -> Sample:
        row = record_of(record)
        path = text_of(row, "audio_id").removeprefix("./")
        modality = speech_as if row.get("task") == "speech" else "audio"
        meta: dict[str, Any] = {key: row[key] for key in ("task", "difficulty", "audio_id", "answer") if key in row}
        choices = [str(choice) for choice in row.get("choices") or ()]
        name, media = str(row.get("id", index)), [Media("audio", path, modality)]
        return self.asked(name, text_of(row, "question"), choices, text_of(row, "answer"), media, index, meta)

    def official_reading(self, row: Row) -> str | None:
        """The true letter where the string match holds, "" for a wrong answer, None for a text without words.

        Rows that hold the true letter only are matched with its option's words.
        """
        words = _words(row.prediction)
        if not words:
            return None
        choices, truth = self.choices_of(row), self.truth_of(row)
        if truth is None or LETTERS.index(truth) >= len(choices):
            return ""
        answer = row.meta.get("answer")
        right = _words(answer if isinstance(answer, str) else choices[LETTERS.index(truth)])
        wrong = {word for choice in choices for word in _words(choice) - right}
        return truth if right <= words and not wrong & words else ""


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
