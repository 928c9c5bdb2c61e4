"""Speech recognition: any manifest of one's own, and what LibriSpeech and the miniature world's speech share.

File: jsonl (or a JSON array), one object a recording, the path under audio_filepath, audio, speech, wav, source or path
and the words under text, transcript, sentence, target or answer (NeMo's and SLAM-LLM's manifests are read as they are):

    {"audio_filepath": "a.flac", "text": "what was said", "language"?: "en"}

Score: the word error rate over the whole set (errors of all rows over words of all references; lower is better, and it
may pass 1 where a model babbles); cer: the same over characters, spaces included. Distances by jiwer, after Whisper's text
normaliser on both sides (whisper_text.py): the English one, or the basic one for rows whose language is another. A row
that could not be used, or has no answer, counts as an empty transcript: all its words are errors (where nobody knows
them, as in a row that cannot be read, one word, one letter). An empty reference is
silence: all words that a model hears there are errors, over no words, as jiwer counts them over a set. No script of
MokA's was published for it: official is strict once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from data.schema import BadSample, Media, Sample
from eval.benchmarks.base import Benchmark, Row, share
from eval.benchmarks.questions import ask, record_of
from eval.benchmarks.whisper_text import whisper_normalised

RECORDING = ("audio_filepath", "audio", "speech", "wav", "source", "path")
WORDS = ("text", "transcript", "sentence", "target", "answer")
QUESTION = "Write down what is said."
ENGLISH = ("en", "eng", "english")


class Asr(Benchmark):
    name = "asr"
    measure = "word error rate, lower is better"
    lower_is_better = True
    empty_truths = True
    home = "write a manifest of your own: see eval/benchmarks/transcription.py"
    separated_by = ("media",)

    def prompt(self, record: Any, index: int) -> Sample:
        row = record_of(record)
        path = next((row[key] for key in RECORDING if isinstance(row.get(key), str)), None)
        words = next((row[key] for key in WORDS if isinstance(row.get(key), str)), None)
        if path is None or words is None:
            raise BadSample(f"expected a path under {', '.join(RECORDING)} and a text under {', '.join(WORDS)}")
        name = str(row.get("id", row.get("key", path)))
        meta = {"audio": path} | {key: row[key] for key in ("language", "lang") if key in row}
        media = [Media("audio", path, "speech")]
        return ask(name, QUESTION, words.strip(), media, index=index, source=self.name, meta=meta)

    def normalised(self, row: Row, text: str) -> str:
        """The text as it is compared."""
        language = str(row.meta.get("language") or row.meta.get("lang") or "en").lower()
        return whisper_normalised(text, language.split("-")[0].split("_")[0] in ENGLISH)

    def parse(self, text: str) -> str | None:
        return whisper_normalised(text) or None

    def reading(self, row: Row) -> str | None:
        return (self.normalised(row, row.said) or None) if row.error is None else None

    def word_errors(self, row: Row) -> tuple[int, int]:
        return self._errors(row, word_errors)

    def _errors(self, row: Row, distance: Callable[[str, str], tuple[int, int]]) -> tuple[int, int]:
        if row.error is not None and not row.answer:
            return 1, 1  # of 0, it would leave the score, and a set of such rows would be without an error
        return distance(self.normalised(row, row.answer), self.reading(row) or "")

    def points(self, row: Row) -> tuple[float, float]:
        errors, words = self.word_errors(row)
        return float(errors), float(words)

    def correct(self, row: Row) -> bool:
        return row.error is None and self.word_errors(row)[0] == 0

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        words = [self.word_errors(row) for row in rows]
        letters = [self._errors(row, letter_errors) for row in rows]
        return {
            "wer": share(sum(errors for errors, _ in words), sum(count for _, count in words)),
            "cer": share(sum(errors for errors, _ in letters), sum(count for _, count in letters)),
            "exact": share(sum(map(self.correct, rows)), len(rows)),
        }

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.details(rows)


@lru_cache(maxsize=16384)
def word_errors(said: str, heard: str) -> tuple[int, int]:
    """Substituted, deleted and inserted words, and the number of words that were said. Both texts normalised."""
    import jiwer

    if not said:  # jiwer refuses an empty reference
        return len(heard.split()), 0
    result = jiwer.process_words(said, heard)
    return result.substitutions + result.deletions + result.insertions, len(said.split())


@lru_cache(maxsize=16384)
def letter_errors(said: str, heard: str) -> tuple[int, int]:
    """The same over characters, spaces included."""
    import jiwer

    if not said:
        return len(heard), 0
    result = jiwer.process_characters(said, heard)
    return result.substitutions + result.deletions + result.insertions, len(said)
