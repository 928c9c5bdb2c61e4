"""Alpaca's instruction, input and output, with media columns, as LLaMA-Factory reads them (JSON array or jsonl):

    {"instruction": "<image>Describe it.", "input": "", "output": "A cat.", "images": ["a.png"],
     "system": "...", "history": [["an earlier question", "its answer"]]}

What the user says is the instruction, a line break and the input, or that one of them which is not empty. The answers in
`history` are samples too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data.schema import BadSample
from data.sources.conversations import Layout, Turn, conversation_rows, with_system
from data.sources.rows import Rows, chosen, describe, text_of
from data.sources.sharegpt import build, media_columns

COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
    "images": "images", "videos": "videos", "audios": "audios",
}  # fmt: skip


def read(path: Path, *, columns: dict[str, str] | None = None, audio_as: str = "audio") -> Rows:
    """Rows of questions, one sample an answer. columns: the file's names, by LLaMA-Factory's (prompt, query, response,
    history, system, images, videos, audios). audio_as: the modality that perceives `audios`."""
    return conversation_rows(path, layout(columns, audio_as))


def layout(columns: dict[str, str] | None = None, audio_as: str = "audio") -> Layout:
    column = chosen("columns", columns, COLUMNS)
    return Layout(
        name="alpaca",
        shape='{"instruction": ..., "input": ..., "output": ...}',
        talk=partial(exchanges, column=column),
        build=partial(build, columns=media_columns(column), audio_as=audio_as),
        uses=frozenset(column.values()),
    )


def exchanges(row: dict[str, Any], column: Mapping[str, str]) -> list[Turn]:
    """The turns of a row that holds one question, its answer, and those before as pairs."""
    turns: list[Turn] = []
    for k, pair in enumerate(_pairs(row, column["history"])):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadSample(f"'{column['history']}' {k}: must be a pair of question and answer, found {describe(pair)}")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    asked = [name for name in (column["prompt"], column["query"]) if row.get(name)]
    if not asked or column["prompt"] not in row:
        asked = [column["prompt"]]
    question = "\n".join(text_of(row, name) for name in asked)
    turns += [Turn("user", question), Turn("assistant", text_of(row, column["response"]))]
    return with_system(row, turns, column["system"])


def _pairs(row: dict[str, Any], column: str) -> list[Any]:
    pairs = row.get(column) or []
    if not isinstance(pairs, list):
        raise BadSample(f"'{column}' must be a list of pairs, found {describe(pairs)}")
    return pairs
