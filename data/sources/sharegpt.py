"""ShareGPT and OpenAI conversations with media columns, as LLaMA-Factory reads them (JSON array or jsonl):

    {"conversations": [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "A cat."}],
     "images": ["a.png"]}
    {"messages": [{"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "Rain."}],
     "audios": ["a.wav"]}

`system` may be a column or the first message, which goes before it. Files with other names: the `columns` and `tags` of
LLaMA-Factory's dataset_info.json are taken as they are. Tools are not shown to the LLM: their description goes into `meta`,
and a row in which they are called is bad (the tags of calls and results are accepted and have no effect).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data.schema import Kind, Message, Role
from data.sources import llava
from data.sources.conversations import Layout, Turn, conversation_rows, turns_of, with_system
from data.sources.placeholders import media_of, place
from data.sources.rows import Rows, chosen

COLUMNS = {
    "messages": "", "system": "system", "tools": "tools", "images": "images", "videos": "videos", "audios": "audios",
}  # fmt: skip
TAGS = {
    "role_tag": "", "content_tag": "", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
    "observation_tag": "observation", "function_tag": "function_call",
}  # fmt: skip


def read(
    path: Path, *, columns: dict[str, str] | None = None, tags: dict[str, str] | None = None, audio_as: str = "audio"
) -> Rows:
    """Rows of conversations, one sample an answer.

    columns: the file's names for messages, system, tools, images, videos, audios; tags: for the role's and the content's
    key and for the user, the assistant, the system, a tool's call and its result. audio_as: the modality that perceives
    `audios`.
    """
    return conversation_rows(path, layout(columns, tags, audio_as))


def layout(
    columns: dict[str, str] | None = None, tags: dict[str, str] | None = None, audio_as: str = "audio"
) -> Layout:
    column = chosen("columns", columns, COLUMNS)
    tag = chosen("tags", tags, TAGS)
    return Layout(
        name="sharegpt",
        shape='{"conversations": [{"from": "human", "value": ...}, ...]} or {"messages": [{"role": ..., "content": ...}]}',
        talk=partial(_talk, column=column, tag=tag),
        build=partial(build, columns=media_columns(column), audio_as=audio_as),
        uses=frozenset({*column.values(), "conversations", "messages"} - {column["tools"]}),
    )


def media_columns(column: Mapping[str, str]) -> dict[Kind, str]:
    return {"image": column["images"], "video": column["videos"], "audio": column["audios"]}


def build(row: dict[str, Any], turns: list[Turn], columns: Mapping[Kind, str], audio_as: str) -> list[Message]:
    return place(turns, media_of(row, columns, audio_as))


def _talk(row: dict[str, Any], column: Mapping[str, str], tag: Mapping[str, str]) -> list[Turn]:
    messages = column["messages"] or ("messages" if "messages" in row else "conversations")
    listed = row.get(messages)
    first = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], dict) else {}
    role = tag["role_tag"] or ("role" if "role" in first else "from")
    content = tag["content_tag"] or ("content" if "content" in first else "value")
    named: dict[str, Role] = {
        tag["user_tag"]: "user", tag["assistant_tag"]: "assistant", tag["system_tag"]: "system",
    }  # fmt: skip
    return with_system(row, turns_of(row, messages, role, content, {**llava.ROLES, **named}), column["system"])
