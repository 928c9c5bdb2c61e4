"""LLaVA's conversations, also as Video-LLaVA and Valley write them: a JSON array (jsonl is read too) of

    {"id": "v1", "video": "valley/0001.mp4", "conversations": [{"from": "human", "value": "<video>\\nWhat happens?"},
                                                               {"from": "gpt", "value": "A dog runs."}]}

`image`, `video` and `audio` hold a path or a list of paths; see data/sources/placeholders.py for their places in the
text. In a row that has videos and no image, `<image>` means the video, as in Valley's files. Where a conversation begins
with the assistant, as some of ShareGPT do, that turn is left out: there is no question to it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from data.schema import Kind, Message, Role
from data.sources.conversations import Layout, Turn, conversation_rows, turns_of, with_system
from data.sources.placeholders import media_of, place
from data.sources.rows import Rows

ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_COLUMNS: dict[Kind, str] = {"image": "image", "video": "video", "audio": "audio"}


def read(path: Path, *, audio_as: str = "audio") -> Rows:
    """Rows of conversations, one sample an answer. audio_as: the modality that perceives the column `audio`."""
    return conversation_rows(path, layout(audio_as))


def layout(audio_as: str = "audio") -> Layout:
    return Layout(
        name="llava",
        shape='{"image" or "video": path, "conversations": [{"from": "human", "value": ...}, ...]}',
        talk=_talk,
        build=partial(_build, audio_as=audio_as),
        uses=frozenset({"conversations", "system", *_COLUMNS.values()}),
    )


def _talk(row: dict[str, Any]) -> list[Turn]:
    turns = turns_of(row, "conversations", "from", "value", {**ROLES, "system": "system"})
    turns = with_system(row, turns)
    told = next((k for k, turn in enumerate(turns) if turn.role != "system"), 0)
    unasked = len(turns) > told + 1 and turns[told].role == "assistant"
    return turns[:told] + turns[told + unasked :]


def _build(row: dict[str, Any], turns: list[Turn], audio_as: str) -> list[Message]:
    media = media_of(row, _COLUMNS, audio_as)
    if media["video"] and not media["image"]:
        turns = [
            turn._replace(content=turn.content.replace("<image>", "<video>")) if isinstance(turn.content, str) else turn
            for turn in turns
        ]
    return place(turns, media)
