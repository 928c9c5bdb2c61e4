"""SLAM-LLM's jsonl: a recording, what is to be written, and perhaps what is asked.

{"key": "1034-121119-0000", "source": "wav/1034-121119-0000.flac", "target": "the law of friendship"}
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data.schema import Media, Sample
from data.sources.index import Raw, json_rows
from data.sources.rows import Rows, ask, text_of, value_of

PROMPT = "Transcribe speech to text."
_SHAPE = '{"key": ..., "source": path, "target": text}'


def read(path: Path, *, prompt: str | None = None, audio_as: str = "speech") -> Rows:
    """Rows of [sound, question] -> target. prompt: the question of all rows; else the row's own `prompt`, else PROMPT.
    audio_as: the modality that perceives `source`."""
    return Rows(path, json_rows(path, _SHAPE), partial(_parse, prompt=prompt, audio_as=audio_as))


def _parse(raw: Raw, index: int, prompt: str | None, audio_as: str) -> Sample:
    row = value_of(raw)
    source, target = text_of(row, "source"), text_of(row, "target")
    question = prompt or (text_of(row, "prompt") if row.get("prompt") else PROMPT)
    return Sample(
        id=str(row.get("key", index)),
        messages=ask([Media("audio", source, audio_as)], question, target),
        source="slam",
        row=index,
        meta={key: value for key, value in row.items() if key not in ("key", "source", "target", "prompt")},
    )
