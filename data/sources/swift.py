"""ms-swift's jsonl (a JSON array is read too): conversations in one of four forms, with media columns.

    {"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["a.png"]}
    {"query": "What is said?", "response": "Hello.", "history": [["Earlier?", "Yes."]], "audios": ["a.wav"]}
    {"conversation": [{"human": "Hi", "assistant": "Ho"}]}
    {"instruction": "Describe it.", "input": "", "output": "A cat."}

Contents of `messages` may be lists of typed parts, as in data/sources/messages.py. `system` may be a column. Where a row
has more media of a kind than placeholders of it, the missing ones stand before the first question, as ms-swift puts them.
A row whose texts have `<ref-object>` or `<bbox>` for entries of a column `objects` is bad: ms-swift fills them in by the
forms of each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data.schema import BadSample, Kind, Media, Message
from data.sources import alpaca, messages
from data.sources.conversations import Layout, Turn, conversation_rows, turns_of, with_system
from data.sources.placeholders import COLUMNS, KINDS, media_of, place
from data.sources.rows import Rows, columns_of, text_of

_EXCHANGE = {"prompt": "query", "query": "", "response": "response", "history": "history", "system": "system"}
_OBJECTS = ("<ref-object>", "<bbox>")
_ALPACA = ("instruction", "input", "output")


def read(path: Path, *, audio_as: str = "audio") -> Rows:
    """Rows of conversations, one sample an answer. audio_as: the modality that perceives `audios`."""
    return conversation_rows(path, layout(audio_as))


def layout(audio_as: str = "audio") -> Layout:
    return Layout(
        name="swift",
        shape='{"messages": [{"role": ..., "content": ...}, ...]} or {"query": ..., "response": ...}',
        talk=_talk,
        build=partial(_build, audio_as=audio_as),
        uses=frozenset(
            {"messages", "conversation", "query", "response", "history", "system", *_ALPACA, *COLUMNS.values()}
        ),
    )


def _talk(row: dict[str, Any]) -> list[Turn]:
    if "messages" in row:
        return with_system(row, turns_of(row, "messages", "role", "content"))
    if "output" in row and "instruction" in row:
        return alpaca.exchanges(row, alpaca.COLUMNS)
    if "response" in row:
        return alpaca.exchanges(row, _EXCHANGE)
    if not isinstance(row.get("conversation"), list):
        raise BadSample(f"there is no 'messages', no 'response' and no 'conversation' ({columns_of(row, 'messages')})")
    turns: list[Turn] = []
    for k, pair in enumerate(row["conversation"]):
        where = f"exchange {k}: "
        turns += [
            Turn("user", text_of(pair, "human", where=where)),
            Turn("assistant", text_of(pair, "assistant", where=where)),
        ]
    return with_system(row, turns)


def _build(row: dict[str, Any], turns: list[Turn], audio_as: str) -> list[Message]:
    if any(isinstance(turn.content, list) for turn in turns):
        built = messages.build(row, turns, audio_as)
    else:
        media = media_of(row, COLUMNS, audio_as)
        built = place(_with_placeholders(turns, media), media)
    unfilled = [tag for tag in _OBJECTS if any(tag in message.text for message in built)]
    if unfilled and row.get("objects"):
        raise BadSample(
            f"{unfilled[0]} stands for an entry of 'objects', which is not filled in here; write names and boxes into the "
            "texts, in the form in which they are to be answered"
        )
    return built


def _with_placeholders(turns: list[Turn], media: Mapping[Kind, list[Media]]) -> list[Turn]:
    """The turns with the placeholders that media lack before the first question."""
    texts = "".join(turn.content for turn in turns if isinstance(turn.content, str))
    front = "".join(f"<{kind}>" * (len(media[kind]) - texts.count(f"<{kind}>")) for kind in KINDS)  # none below zero
    first = next((k for k, turn in enumerate(turns) if turn.role == "user"), None)
    if front and first is not None and isinstance(turns[first].content, str):
        turns = [*turns[:first], Turn("user", front + turns[first].content), *turns[first + 1 :]]
    return turns
