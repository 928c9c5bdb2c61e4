"""Messages with typed content, one JSON object a line (a JSON array of such objects is read too):

    {"id": "a1", "messages": [
        {"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "audio", "path": "clip.mp4"},
                                     {"type": "text", "text": "What is heard?", "question": true}]},
        {"role": "assistant", "content": "A flute."}], "meta": {"any": "thing"}}

Content is a text or a list of parts. A medium has a path and, where the default is not meant, `as`: the modality whose
encoder perceives it. A text is a text, also where it says `<image>`.

    text     `question: true` marks the text whose tokens are keys; where none of the turn is marked, all of it is
    video    its picture only                           as vision
    image    one picture                                as vision
    audio    a sound file, or a video for its track     as audio; a recording of speech says "as": "speech"
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from data.schema import BadSample, Kind, Media, Message, Text, nearest
from data.sources.conversations import Layout, Turn, conversation_rows, turns_of
from data.sources.rows import Rows, describe, text_of

_MODALITY: dict[str, tuple[Kind, str]] = {
    "video": ("video", "vision"),
    "image": ("image", "vision"),
    "audio": ("audio", "audio"),
}


def read(path: Path) -> Rows:
    """Rows of conversations, one sample an answer. No options."""
    return conversation_rows(path, LAYOUT)


def _build(row: dict[str, Any], turns: list[Turn]) -> list[Message]:
    return [_message(turn, f"message {k}: ") for k, turn in enumerate(turns)]


def _message(turn: Turn, where: str) -> Message:
    content = turn.content
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample(f"{where}'content' must be a text or a list of parts, found {describe(content)}")
    if not content:
        raise BadSample(f"{where}'content' is an empty list; expected text or media")
    return Message(turn.role, tuple(_part(part, turn.role, where) for part in content))


def _part(part: Any, role: str, where: str) -> Text | Media:
    kind = text_of(part, "type", where=where)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadSample(f"{where}a text part wants 'text', found {describe(part)}")
        return Text(part["text"], question=part.get("question") is True)
    if kind not in _MODALITY:
        raise BadSample(f"{where}unknown type '{kind}' of content{nearest(kind, ['text', *_MODALITY])}")
    if role != "user":
        raise BadSample(f"{where}a {kind} may stand in the user's messages only, not in the {role}'s")
    media_kind, modality = _MODALITY[kind]
    named = part.get("as") is not None  # in tables such as Arrow's all parts have all columns
    return Media(
        media_kind, text_of(part, "path", where=where), text_of(part, "as", where=where) if named else modality
    )


LAYOUT = Layout(
    name="messages",
    shape='{"messages": [{"role": ..., "content": ...}, ...]}',
    talk=partial(turns_of, column="messages", role_key="role", content_key="content"),
    build=_build,
    uses=frozenset({"messages"}),
)
