"""Transcription of the miniature world's speech: what was said, word for word.

File: SPLIT/transcription.jsonl (messages rows); media: SPLIT/speech/*.wav. Score: 1 - word error rate over the whole
set (below zero where a model babbles), after `normalise` on both sides; otherwise as in transcription.py.
"""

from __future__ import annotations

from eval.benchmarks.base import Row, normalise
from eval.benchmarks.transcription import Asr


class MiniworldTranscription(Asr):
    name = "miniworld_transcription"
    measure = "1 - word error rate"
    lower_is_better = False
    source = "messages"
    home = ""

    def normalised(self, row: Row, text: str) -> str:
        return normalise(text)

    def parse(self, text: str) -> str | None:
        return normalise(text) or None

    def points(self, row: Row) -> tuple[float, float]:
        errors, words = self.word_errors(row)
        return float(words - errors), float(words)
