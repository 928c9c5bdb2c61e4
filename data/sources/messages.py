"""Messages with typed content, one JSON object a line (a JSON array of such objects is read too):

    {"id": "a1", "messages": [
        {"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "audio", "path": "clip.mp4"},
                                     {"type": "text", "text": "What is heard?", "question": true}]},
        {"role": "assistant", "content": "A flute."}], "meta": {"any": "thing"}}

Content is a text or a list of parts. A medium has a path (also under its type's name or `url`, as in Hugging Face's chats)
and, where the default is not meant, `as`: the modality whose encoder perceives it. A text is a text, also where it says
`<image>`.

    text     `question: true` marks the text whose tokens are keys; where none of the turn is marked, all of it is
    video    its picture only                           as vision
    image    one picture                                as vision
    audio    a sound file, or a video for its track     as audio; a recording of speech says "as": "speech"
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, get_args

from data.schema import BadSample, Kind, Media, Message, Text, nearest
from data.sources.conversations import Layout, Turn, conversation_rows, turns_of
from data.sources.rows import Rows, describe, text_of

_KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}


def read(path: Path, *, audio_as: str = "audio") -> Rows:
    """Rows of conversations, one sample an answer. audio_as: the modality that perceives sounds which do not say theirs."""
    return conversation_rows(path, layout(audio_as))


def layout(audio_as: str = "audio") -> Layout:
    return Layout(
        name="messages",
        shape='{"messages": [{"role": ..., "content": ...}, ...]}',
        talk=partial(turns_of, column="messages", role_key="role", content_key="content"),
        build=partial(_build, audio_as=audio_as),
        uses=frozenset({"messages"}),
    )


def _build(row: dict[str, Any], turns: list[Turn], audio_as: str) -> list[Message]:
    return [_message(turn, audio_as, f"message {k}: ") for k, turn in enumerate(turns)]


def _message(turn: Turn, audio_as: str, where: str) -> Message:
    content = turn.content
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample(f"{where}'content' must be a text or a list of parts, found {describe(content)}")
    if not content:
        raise BadSample(f"{where}'content' is an empty list; expected text or media")
    return Message(turn.role, tuple(_part(part, turn.role, audio_as, where) for part in content))


def _part(part: Any, role: str, audio_as: str, where: str) -> Text | Media:
    kind = text_of(part, "type", where=where)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadSample(f"{where}a text part wants 'text', found {describe(part)}")
        return Text(part["text"], question=part.get("question") is True)
    if kind not in _KINDS:
        raise BadSample(f"{where}unknown type '{kind}' of content{nearest(kind, ['text', *_KINDS])}")
    if role != "user":
        raise BadSample(f"{where}a {kind} may stand in the user's messages only, not in the {role}'s")
    # in tables such as Arrow's all parts have all columns, so that one without a value is as good as none
    path = next((key for key in ("path", kind, "url") if part.get(key) is not None), "path")
    modality = audio_as if kind == "audio" else "vision"
    if part.get("as") is not None:
        modality = text_of(part, "as", where=where)
    return Media(_KINDS[kind], text_of(part, path, where=where), modality)
