"""Messages with typed content, one JSON object a line (a JSON array of such objects is read too):

    {"id": "a1", "messages": [
        {"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "audio", "path": "clip.mp4"},
                                     {"type": "text", "text": "What is heard?", "question": true}]},
        {"role": "assistant", "content": "A flute."}], "meta": {"any": "thing"}}

Content is a text or a list of parts. A medium has a path (also under its type's name or `url`, as in Hugging Face's and
OpenAI's chats: {"type": "image_url", "image_url": {"url": ...}}) and, where the default is not meant, `as`: the modality
whose encoder perceives it. Where the parts have no path, {"type": "image"}, columns of the row list them in their order,
or by the parts' `index`: `images` (or `image`), `videos`, `audios`. A text is a text, also where it says `<image>`. Media
are taken whole: a part with Qwen's `video_start` or the like makes its row bad.

    text     `question: true` marks the text whose tokens are keys; where none of the turn is marked, all of it is
    video    its picture only                           as vision
    image    one picture                                as vision
    audio    a sound file, or a video for its track     as audio; a recording of speech says "as": "speech"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.schema import BadSample, Kind, Media, Message, Text, nearest
from data.sources.conversations import Layout, Turn, conversation_rows, turns_of
from data.sources.placeholders import COLUMNS, OTHER_NUMBER, media_of, names_media, path_of
from data.sources.rows import Rows, describe, text_of

_CUT = re.compile(r"((video|audio)_)?(start|end)(_time)?")  # keys of a part: from and to which second it is meant


def read(path: Path, *, audio_as: str = "audio") -> Rows:
    """Rows of conversations, one sample an answer. audio_as: the modality that perceives sounds which do not say theirs."""
    return conversation_rows(path, layout(audio_as))


def layout(audio_as: str = "audio") -> Layout:
    return Layout(
        name="messages",
        shape='{"messages": [{"role": ..., "content": ...}, ...]}',
        talk=partial(turns_of, column="messages", role_key="role", content_key="content"),
        build=partial(build, audio_as=audio_as),
        uses=frozenset({"messages"}),
    )


def build(row: dict[str, Any], turns: list[Turn], audio_as: str) -> list[Message]:
    """Messages of typed content; a part without a path stands for one of the media that the row's columns list."""
    content = [_parts(turn, f"message {k}: ") for k, turn in enumerate(turns)]
    media = [(f"message {k}: ", part) for k, parts in enumerate(content) for part in parts if part["type"] != "text"]
    bare = [(where, part) for where, part in media if _path_key(part) is None]
    listed: dict[int, Media] = {}
    if bare or (not media and any(names_media(row.get(column)) for column in OTHER_NUMBER)):
        for kind, found in media_of(row, COLUMNS, audio_as).items():
            listed |= _listed([(where, part) for where, part in bare if _kind(part) == kind], found, kind)
    return [
        Message(turn.role, tuple(_part(part, turn.role, audio_as, listed, f"message {k}: ") for part in parts))
        for k, (turn, parts) in enumerate(zip(turns, content, strict=True))
    ]


def _listed(places: list[tuple[str, dict[str, Any]]], found: list[Media], kind: Kind) -> dict[int, Media]:
    """The media of a column for the parts, by identity, that have no path: in their order, or by the parts' `index`."""
    if places and not found:
        where, part = places[0]
        raise BadSample(f"{where}'path' is missing or empty in {describe(part)}; nor has the row {kind}s")
    numbers: list[Any] = [part.get("index") for _, part in places]
    if places and all(isinstance(number, int) for number in numbers):
        if wrong := [number for number in numbers if not 0 <= number < len(found)]:
            raise BadSample(f"index {wrong[0]} of a part of type {kind}: the row names {len(found)} {kind}s")
        return {id(part): found[number] for (_, part), number in zip(places, numbers, strict=True)}
    if len(places) != len(found):
        raise BadSample(
            f"the messages have {len(places)} parts of type {kind} without a path, but the row names {len(found)} "
            f"{kind}s; expected one for each"
        )
    return {id(part): medium for (_, part), medium in zip(places, found, strict=True)}


def _parts(turn: Turn, where: str) -> list[dict[str, Any]]:
    """The parts of a turn, each with a known `type`."""
    content = turn.content
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample(f"{where}'content' must be a text or a list of parts, found {describe(content)}")
    if not content:
        raise BadSample(f"{where}'content' is an empty list; expected text or media")
    for part in content:
        kind = text_of(part, "type", where=where)
        if kind != "text" and _kind(part) not in COLUMNS:
            raise BadSample(f"{where}unknown type '{kind}' of content{nearest(kind, ['text', *COLUMNS])}")
    return content


def _kind(part: dict[str, Any]) -> Any:
    return str(part["type"]).removesuffix("_url")


def _path_key(part: dict[str, Any]) -> str | None:
    """Under which key a medium's path stands."""
    # in tables such as Arrow's all parts have all columns, so that one without a value is as good as none
    kind = _kind(part)
    return next((key for key in ("path", kind, "url", f"{kind}_url") if part.get(key) is not None), None)


def _part(part: dict[str, Any], role: str, audio_as: str, listed: Mapping[int, Media], where: str) -> Text | Media:
    kind = _kind(part)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise BadSample(f"{where}a text part wants 'text', found {describe(part)}")
        return Text(part["text"], question=part.get("question") is True)
    if role != "user":
        raise BadSample(f"{where}a {kind} may stand in the user's messages only, not in the {role}'s")
    if cut := [key for key in part if _CUT.fullmatch(key) and part[key] is not None]:
        raise BadSample(
            f"{where}'{cut[0]}' means a stretch of the {kind}, and media are read whole: cut it out (ffmpeg -ss START "
            "-to END -i IN OUT) and name the new file"
        )
    if (key := _path_key(part)) is None:
        medium = listed[id(part)]
    else:
        path = path_of(part[key], key) if isinstance(part[key], dict) else text_of(part, key, where=where)
        medium = Media(kind, path, audio_as if kind == "audio" else "vision")
    return medium if part.get("as") is None else replace(medium, modality=text_of(part, "as", where=where))
