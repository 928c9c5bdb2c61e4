"""Transcription of the miniature world's speech: what was said, word for word.

File: SPLIT/transcription.jsonl (messages rows); media: SPLIT/speech/*.wav. Score: 1 - word error rate over the whole
set (errors of all rows over words of all references; below zero where a model babbles). WER and CER by jiwer, after
`normalise` on both sides. A row that could not be used counts as an empty transcript: all its words are errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.benchmarks.base import Benchmark, Row, normalise, share


class MiniworldTranscription(Benchmark):
    name = "miniworld_transcription"
    source = "messages"
    measure = "1 - word error rate"

    def parse(self, text: str) -> str | None:
        return normalise(text) or None

    def points(self, row: Row) -> tuple[float, float]:
        errors, words = word_errors(row.answer, self._heard(row))
        return float(words - errors), float(words)

    def _heard(self, row: Row) -> str:
        return row.prediction if row.error is None else ""

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        words = [word_errors(row.answer, self._heard(row)) for row in rows]
        letters = [letter_errors(row.answer, self._heard(row)) for row in rows]
        return {
            "wer": share(sum(errors for errors, _ in words), sum(count for _, count in words)),
            "cer": share(sum(errors for errors, _ in letters), sum(count for _, count in letters)),
            "exact": share(sum(errors == 0 and count > 0 for errors, count in words), len(rows)),
        }


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Substituted, deleted and inserted words, and the number of reference words."""
    import jiwer

    said, heard = normalise(reference), normalise(hypothesis)
    if not said:  # jiwer refuses an empty reference
        return len(heard.split()), 0
    result = jiwer.process_words(said, heard)
    return result.substitutions + result.deletions + result.insertions, len(said.split())


def letter_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """The same over characters, spaces included."""
    import jiwer

    said, heard = normalise(reference), normalise(hypothesis)
    if not said:
        return len(heard), 0
    result = jiwer.process_characters(said, heard)
    return result.substitutions + result.deletions + result.insertions, len(said)
