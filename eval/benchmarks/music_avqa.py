"""MUSIC-AVQA (Li et al. 2022): audio-visual questions about music, nine question types, 42 possible answers.

Files, as published (gewu-lab.github.io/MUSIC-AVQA): avqa-test.json (rows: data/sources/music_avqa.py); media folder: the
one that holds videos/ID.mp4, whose own track is the sound.

Predictions: rows of the published MokA script {"output": "x</s>", "question_type": ["Audio-Visual", "Counting"],
"predict": "... <answer> x </answer>"}, or eval/run.py's, whose answers may also stand without tags.

    parsed     exactly one <answer>...</answer> (published rows), and in it one of the 42 answers
    strict     right if equal to the truth; over all rows. Letters' case and punctuation do not matter
    official   right if the truth is a substring of the answer (`no` is in `piano`, `one` in `xylophone`), and unparsed
               rows leave the denominator; the 42 answers as they are written, case included

Both for the whole and for each question type. Published rows carry no name of their clip or question; where a file adds
none (id, question_id, or media path and question), repeated rows cannot be told from like ones, and stay.

lmms-eval 0.7.3 has no MUSIC-AVQA; eval/lmms/tasks/music_avqa.yaml is this benchmark as a task of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

from eval.benchmarks.base import Earned, Row, normalise, share
from eval.benchmarks.fields import without_end
from eval.benchmarks.short_answer import TypedShortAnswer, question_type
from eval.benchmarks.tags import tagged

ANSWERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "more than ten",
    "yes", "no", "left", "middle", "right", "indoor", "outdoor", "simultaneously",
    "accordion", "acoustic_guitar", "bagpipe", "banjo", "bassoon", "cello", "clarinet", "congas", "drum",
    "electric_bass", "erhu", "flute", "guzheng", "piano", "pipa", "saxophone", "suona", "trumpet", "tuba", "ukulele",
    "violin", "xylophone",
)  # fmt: skip
_NORMALISED = {normalise(answer) for answer in ANSWERS}
LONGEST = 300  # letters; a longer text between tags is none of the answers


class MusicAvqa(TypedShortAnswer):
    name = "music_avqa"
    source = "music_avqa"
    options: ClassVar[dict[str, Any]] = {"video_dir": "videos"}
    home = (
        "get avqa-test.json and the videos from gewu-lab.github.io/MUSIC-AVQA, name the first as the path and the folder "
        "that holds videos/ID.mp4 as the media folder"
    )

    def parse(self, text: str) -> str | None:
        """One of the 42 answers, normalised, between tags or without any."""
        return _one_of(text if "<answer>" not in text else _between(text))

    def reading(self, row: Row) -> str | None:
        if row.error is not None:
            return None
        return _one_of(_between(row.said)) if row.published else self.parse(row.said)

    def official_reading(self, row: Row) -> str | None:
        text = row.prediction
        found = text.strip() if not row.published and "<answer>" not in text else _between(text)
        return found if found in ANSWERS else None

    def official(self, rows: Sequence[Row]) -> list[Earned]:
        return [Earned(row.unit, float(right), 1.0) for row, right in self._officially(rows)]

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        by_type: dict[str, list[bool]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)
        for row in rows:
            counts[" ".join(question_type(row))] += 1
        for row, right in self._officially(rows):
            by_type[" ".join(question_type(row))].append(right)
        types = {
            name: {"rows": count, "parsed": len(right), "accuracy": share(sum(right), len(right))}
            for name, count, right in ((name, counts[name], by_type[name]) for name in sorted(counts))
        }
        return {"types": types}

    def _officially(self, rows: Sequence[Row]) -> list[tuple[Row, bool]]:
        """Parsed rows and whether they are right."""
        pairs = [(row, self.official_reading(row)) for row in rows]
        return [(row, without_end(row.answer) in answer) for row, answer in pairs if answer is not None and row.answer]


def _between(text: str) -> str:
    """What stands in the one pair of tags; "" where there is none, or more."""
    found = tagged(text, "answer")
    return found[0] if len(found) == 1 else ""


def _one_of(text: str) -> str | None:
    answer = normalise(text) if len(text) <= LONGEST else ""
    return answer if answer in _NORMALISED else None
