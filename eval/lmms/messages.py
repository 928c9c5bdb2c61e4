"""lmms-eval's chat messages and this project's: the same thing in two spellings.

    {"role": "user", "content": [{"type": "video", "url": ...}, {"type": "audio", "url": ...},
                                 {"type": "text", "text": ...}]}

Two keys of our own, which other models ignore: `as` beside a medium names the modality that perceives it, and
`question: true` beside a text marks the keys of the cross-modal attention (where none of the last turn is marked, all
of it is; as in data/sources/messages.py). Earlier turns are history.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.schema import BadSample, Kind, Media, Message, Sample, Text, nearest
from eval.lmms.media import GivenMedia, kind_of

KINDS: dict[str, Kind] = {"image": "image", "video": "video", "audio": "audio"}
ROLES = ("system", "user", "assistant")


def sample_of(messages: Any, media: GivenMedia, sound: str, name: str) -> Sample:
    """The sample of a conversation that ends with a user's turn; its media are added to `media`.

    sound: the modality that perceives sound where the message names none. Raises BadSample.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise BadSample(f"{name}: the task gave no messages")
    told = tuple(_message(message, media, sound, name) for message in messages)
    if told[-1].role != "user":
        raise BadSample(f"{name}: the last message is the {told[-1].role}'s; expected a user's turn to answer")
    return Sample(name, told, source="lmms-eval")


def messages_of(prompt: Sequence[Message], media_dir: Path) -> list[dict[str, Any]]:
    """A sample's prompt in lmms-eval's spelling, media by their absolute paths."""
    return [
        {"role": message.role, "content": [_spelled(part, media_dir) for part in message.content]} for message in prompt
    ]


def user_turn(visuals: Sequence[Any] | None, text: str) -> list[dict[str, Any]]:
    """The turn of a task that gives media and a text instead of messages."""
    media = [{"type": kind_of(visual), "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def _message(message: Any, media: GivenMedia, sound: str, name: str) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if role not in ROLES:
        raise BadSample(f"{name}: a message's role is {role!r}; expected one of {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise BadSample(f"{name}: a message's content is {type(content).__name__}; expected a text or a list of parts")
    return Message(role, tuple(_part(part, role, media, sound, name) for part in parts))


def _part(part: Any, role: str, media: GivenMedia, sound: str, name: str) -> Text | Media:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return Text(str(part.get("text", "")), question=part.get("question") is True)
    if kind not in KINDS:
        raise BadSample(f"{name}: unknown type {kind!r} of content{nearest(str(kind), ['text', *KINDS])}")
    if role != "user":
        raise BadSample(f"{name}: a {kind} stands in the {role}'s message; expected media in the user's only")
    path = media.add(part.get("url"), KINDS[kind])
    return Media(KINDS[kind], path, part.get("as") or (sound if kind == "audio" else "vision"))


def _spelled(part: Text | Media, media_dir: Path) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text, "question": part.question}
    return {"type": part.kind, "url": str((media_dir / part.path).absolute()), "as": part.modality}
