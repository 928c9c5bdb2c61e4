"""Messages with typed content, one JSON object a line (a JSON array of such objects is read too):

    {"id": "a1", "messages": [
        {"role": "user", "content": [{"type": "video", "path": "clip.mp4"}, {"type": "audio", "path": "clip.mp4"},
                                     {"type": "text", "text": "What is heard?", "question": true}]},
        {"role": "assistant", "content": "A flute."}], "meta": {"any": "thing"}}

Content is a text or a list of parts. A medium has a path and, where the default is not meant, `as`: the modality whose
encoder perceives it.

    text     `question: true` marks the text whose tokens are keys; where none of the turn is marked, all of it is
    video    its picture only                           as vision
    image    one picture                                as vision
    audio    a sound file, or a video for its track     as audio; a recording of speech says "as": "speech"

A conversation of n answers is n samples: the k-th has the turns before as plain history, and bears its loss on answer k
only. Other keys of the row are kept in `meta`.

Cost: the file is read through once at opening to count turns; after that a row is read from its place in the file when
asked for.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.schema import BadSample, Kind, Media, Message, Role, Sample, Text, UserError, nearest
from data.sources.rows import Rows, describe, not_json, read_array, text_of

_MODALITY: dict[str, tuple[Kind, str]] = {
    "video": ("video", "vision"),
    "image": ("image", "vision"),
    "audio": ("audio", "audio"),
}
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_SHAPE = 'expected {"messages": [{"role": ..., "content": ...}, ...]}'


class _Record(NamedTuple):
    """One answer of one row: its text or parsed object, its line, and which answer it is."""

    value: bytes | Any
    line: int
    turn: int


class _Lines(Sequence[_Record]):
    """Records of a jsonl file by their byte offsets; opens the file for each, so that it can be pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets, self.lines, self.turns = array("q"), array("q"), array("q")
        offset, checked = 0, False
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = _clean(line)
                if text:
                    answers = _count_answers(text)
                    if not checked and answers is None:
                        _check_first(path, text, number)
                    checked = True
                    for turn in range(max(1, answers or 0)):
                        self.offsets.append(offset)
                        self.lines.append(number)
                        self.turns.append(turn)
                offset += len(line)
        if not checked:
            raise UserError(f"{path}: holds no rows; {_SHAPE} on each line")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return _Record(_clean(file.readline()), self.lines[index], self.turns[index])


def read(path: Path) -> Rows:
    """Rows of conversations, one sample an answer. No options."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    records: Sequence[_Record] = _array(path) if head == b"[" else _Lines(path)
    return Rows(path, records, _parse)


def _clean(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _array(path: Path) -> list[_Record]:
    values = read_array(path, path.read_bytes().decode("utf-8-sig", errors="replace"))
    return [_Record(v, -1, turn) for v in values for turn in range(max(1, _answers(v)))]


def _count_answers(text: bytes) -> int | None:
    """Answers in one line; None if it is not JSON."""
    try:
        return _answers(json.loads(text))
    except ValueError:
        return None


def _answers(value: Any) -> int:
    messages = value.get("messages") if isinstance(value, dict) else None
    return (
        sum(isinstance(m, dict) and m.get("role") == "assistant" for m in messages) if isinstance(messages, list) else 0
    )


def _check_first(path: Path, text: bytes, line: int) -> None:
    """A file whose very first row is not JSON is no file of this format."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, {not_json(error, line)}; {_SHAPE} on each line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {line}: is not UTF-8 text; {_SHAPE} on each line") from None


def _parse(record: _Record, index: int) -> Sample:
    value, line, turn = record
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadSample(f"{not_json(error, line)}; {_SHAPE}") from None
        except UnicodeDecodeError:
            raise BadSample(f"line {line}: is not UTF-8 text") from None
    try:
        return _sample(value, index, turn, line)
    except BadSample as error:
        raise BadSample(f"line {line}: {error}" if line > 0 else str(error)) from None


def _sample(value: Any, index: int, turn: int, line: int) -> Sample:
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        raise BadSample(f"{_SHAPE}, found {describe(value)}")
    messages = [_message(raw, f"message {k}: ") for k, raw in enumerate(value["messages"])]
    _check_order(messages)
    answers = [k for k, message in enumerate(messages) if message.role == "assistant"]
    kept = messages[: answers[turn] + 1]
    kept = [_plain(m) for m in kept[:-2]] + [_with_question(m) for m in kept[-2:-1]] + kept[-1:]
    extra = {key: v for key, v in value.items() if key not in ("id", "messages", "meta")}
    meta = value.get("meta") or {}
    if not isinstance(meta, dict):
        raise BadSample(f"'meta' must be an object, found {describe(meta)}")
    name = str(value.get("id", line if line > 0 else index))
    return Sample(
        id=name if len(answers) == 1 else f"{name}#{turn}",
        messages=tuple(kept),
        source="messages",
        row=index,
        meta={**extra, **meta},
    )


def _check_order(messages: list[Message]) -> None:
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for k, message in enumerate(turns):
        expected = "assistant" if k % 2 else "user"
        if message.role != expected:
            raise BadSample(
                f"user and assistant must take turns; expected the {expected} as turn {k}, found the {message.role}"
            )
    if not turns or turns[-1].role != "assistant":
        raise BadSample("the row has no answer: its last message must be the assistant's")


def _message(raw: Any, where: str) -> Message:
    role = text_of(raw, "role", where=where)
    if role not in _ROLES:
        raise BadSample(f"{where}unknown role '{role}'{nearest(role, _ROLES)}")
    content = raw.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSample(f"{where}'content' must be a text or a list of parts, found {describe(content)}")
    parts = tuple(_part(part, role, where) for part in content)
    message = Message(role, parts)
    if role == "assistant" and not message.text.strip():
        raise BadSample(f"{where}the answer is empty; expected a text")
    if not parts:
        raise BadSample(f"{where}'content' is an empty list; expected text or media")
    return message


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
    return Media(
        media_kind, text_of(part, "path", where=where), text_of(part, "as", where=where) if "as" in part else modality
    )


def _plain(message: Message) -> Message:
    """A message of the history: none of its text is the question."""
    return Message(message.role, tuple(Text(p.text) if isinstance(p, Text) else p for p in message.content))


def _with_question(message: Message) -> Message:
    """The user's message of this turn: its marked texts are the question, or all of them where none is marked."""
    if any(isinstance(p, Text) and p.question for p in message.content):
        return message
    return Message(
        message.role, tuple(Text(p.text, question=True) if isinstance(p, Text) else p for p in message.content)
    )
