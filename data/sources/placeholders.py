"""Formats in which `<image>`, `<video>` and `<audio>` in a text stand for the media that columns of the row list.

    "<image>\\nWhat is it? <audio>"  +  images: [a.png], audios: [a.wav]  ->  a.png, "What is it? ", a.wav

The k-th placeholder of a kind is the k-th medium of that kind; line breaks beside it belong to it. As many placeholders
as media, or the row is bad: a text that must say `<image>` belongs into the format `messages`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from data.schema import BadSample, Kind, Media, Message, Text
from data.sources.conversations import Turn
from data.sources.rows import describe

KINDS: tuple[Kind, ...] = ("image", "video", "audio")
COLUMNS: dict[Kind, str] = {"image": "images", "video": "videos", "audio": "audios"}
OTHER_NUMBER = {a: b for one, many in COLUMNS.items() for a, b in ((str(one), many), (many, str(one)))}
_PLACEHOLDER = re.compile("<(image|video|audio)>")
_ELSEWHERE = "(text that only looks like one belongs into the format 'messages')"


def media_of(row: dict[str, Any], columns: Mapping[Kind, str], audio_as: str) -> dict[Kind, list[Media]]:
    """The media that the row's columns list. A column holds a path, {"path": ...}, a list of such, or nothing.

    Where it is called `image` or `images`, `video` or `videos`, ..., the other of the two names does as well. BadSample for
    a row with sound in a column `speech` (LLaMA-Omni's), which would be lost.
    """
    if "speech" not in columns.values() and names_media(row.get("speech")):
        raise BadSample(
            f"a column 'speech' names a sound, which is not read: call it '{columns['audio']}' and its place in the text "
            "<audio>, and set the source's options: {audio_as: speech}"
        )
    found: dict[Kind, list[Media]] = {}
    for kind in KINDS:
        column = columns[kind]
        if row.get(column) in (None, "", []) and names_media(row.get(OTHER_NUMBER.get(column, ""))):
            column = OTHER_NUMBER[column]
        modality = audio_as if kind == "audio" else "vision"
        found[kind] = [Media(kind, path_of(entry, column), modality) for entry in entries_of(row.get(column))]
    return found


def entries_of(value: Any) -> list[Any]:
    """The entries of a media column's value: a list, one alone, or none."""
    if isinstance(value, list):
        return value
    return [] if value in (None, "") else [value]


def names_media(value: Any) -> bool:
    """Whether a value is likely to name files, and not a clip's number or the like: a name with a suffix, a struct."""
    if isinstance(value, list):
        return bool(value) and names_media(value[0])
    return isinstance(value, dict) or (isinstance(value, str) and re.search(r"\.[A-Za-z0-9]{2,5}$", value) is not None)


def path_of(entry: Any, column: str) -> str:
    """The path of an entry of a media column; of a struct, as Hugging Face's media features are, its `path` (or `url`)."""
    path = (entry.get("path") or entry.get("url")) if isinstance(entry, dict) else entry
    if isinstance(entry, dict) and entry.get("bytes") is not None:
        raise BadSample(
            f"'{column}' holds the bytes of a medium, and media are read from files: write it below data.media_dir (source "
            "hf: options: {extract: FOLDER} does so), and name it by its path"
        )
    if not isinstance(path, str) or not path:
        raise BadSample(f"'{column}' must hold paths of media, found {describe(entry)}")
    return path


def place(turns: list[Turn], media: Mapping[Kind, list[Media]]) -> list[Message]:
    """Messages with the media in the places of their placeholders."""
    for k, turn in enumerate(turns):
        if not isinstance(turn.content, str):
            raise BadSample(f"message {k}: must be a text, found {describe(turn.content)}")
    _check_counts(turns, media)
    queues = {kind: iter(items) for kind, items in media.items()}
    return [Message(turn.role, tuple(_parts(turn.content, queues))) for turn in turns]


def _check_counts(turns: list[Turn], media: Mapping[Kind, list[Media]]) -> None:
    for kind, items in media.items():
        places = [turn.role for turn in turns for _ in range(turn.content.count(f"<{kind}>"))]
        if len(places) != len(items):
            raise BadSample(
                f"the texts hold {len(places)} <{kind}>, but the row names {len(items)} {kind}s; expected one for each "
                f"{_ELSEWHERE}"
            )
        if wrong := [role for role in places if role != "user"]:
            raise BadSample(
                f"<{kind}> stands in the {wrong[0]}'s message; media may be in the user's only {_ELSEWHERE}"
            )


def _parts(text: str, queues: Mapping[Kind, Iterator[Media]]) -> Iterator[Text | Media]:
    pieces = _PLACEHOLDER.split(text)  # text, kind, text, kind, ..., text
    for k, piece in enumerate(pieces):
        if k % 2:
            yield next(queues[piece])  # type: ignore[index]
            continue
        piece = piece.lstrip("\r\n") if k else piece
        piece = piece.rstrip("\r\n") if k < len(pieces) - 1 else piece
        if piece:
            yield Text(piece)
