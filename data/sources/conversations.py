"""Conversations of any layout to samples, one for each answer.

    row --talk--> turns (role, content) --build--> messages --up to answer k--> Sample

`talk` only finds the turns, so that a file can be indexed without making messages; `build` makes text and media of
their contents. A conversation of n answers is n samples: the k-th has the turns before as plain history, and bears its
loss on answer k only, so that what is wrong after an answer does not lose it. An answer that is kept out of the loss, by
"loss": false (ms-swift) or "weight": 0 (OpenAI), is history of the later ones and no sample. Thoughts beside an answer
(`reasoning_content`) are the same as in it: <think> ... </think>. Columns that the layout does not use are kept in `meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data.schema import BadSample, Message, Role, Sample, Text, nearest
from data.sources.index import Raw, json_rows
from data.sources.rows import Rows, columns_of, describe, text_of, value_of

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a message beside its content


class Turn(NamedTuple):
    """What one of the roles says: a text, or parts in the layout's own form. learned: False of an answer without loss."""

    role: Role
    content: Any
    learned: bool = True

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant" and self.learned


@dataclass(frozen=True)
class Layout:
    """How a format writes a conversation. Its functions are modules' own or partials of them: it is pickled.

    build: a message for each turn. shape: what a row looks like, for messages. uses: columns that do not go into `meta`.
    Both functions raise BadSample.
    """

    name: str
    shape: str
    talk: Callable[[dict[str, Any]], list[Turn]]
    build: Callable[[dict[str, Any], list[Turn]], list[Message]]
    uses: frozenset[str]


def conversation_rows(path: Path, layout: Layout) -> Rows:
    """A jsonl file, or a JSON array, of conversations."""
    records = json_rows(path, layout.shape, partial(count_answers, layout=layout))
    return Rows(path, records, partial(_parse, layout=layout))


def count_answers(row: Any, layout: Layout) -> int:
    """Answers of a row that bear loss; 0 of one that is no conversation."""
    try:
        return sum(turn.is_answer for turn in layout.talk(row)) if isinstance(row, dict) else 0
    except BadSample:
        return 0


def turns_of(
    row: dict[str, Any], column: str, role_key: str, content_key: str, roles: Mapping[str, Role] = ROLES
) -> list[Turn]:
    """The turns of a column that lists messages, without an empty system message before them."""
    if column not in row:
        raise BadSample(f"there is no '{column}' ({columns_of(row, column)})")
    messages = row[column]
    if not isinstance(messages, list):
        raise BadSample(f"'{column}' must be a list of messages, found {describe(messages)}")
    turns = []
    for k, message in enumerate(messages):
        where = f"message {k}: "
        role = text_of(message, role_key, where=where)
        if role not in roles:
            raise BadSample(f"{where}unknown role '{role}'{nearest(role, roles)}")
        if content_key not in message:
            raise BadSample(f"{where}'{content_key}' is missing ({columns_of(message, content_key)})")
        learned = message.get("loss") != 0 and message.get("weight") != 0  # False, 0, 0.0; tables have None for neither
        turns.append(Turn(roles[role], _content(message, content_key, roles[role]), learned))
    return turns[1:] if turns and turns[0].role == "system" and _is_blank(turns[0].content) else turns


def _content(message: dict[str, Any], content_key: str, role: Role) -> Any:
    """A message's content, a text or parts; an answer's after the thoughts that stand in a key of their own, if any."""
    content = message[content_key]
    beside = (message.get(key) for key in THOUGHTS if key != content_key)
    thoughts = next((value for value in beside if isinstance(value, str) and value.strip()), "")
    if role != "assistant" or not thoughts or not isinstance(content, (str, list)) or _is_blank(content):
        return content
    if "</think>" in str(content):  # holds its thoughts itself
        return content
    block = f"<think>\n{thoughts.strip()}\n</think>\n\n"
    return block + content if isinstance(content, str) else [{"type": "text", "text": block}, *content]


def with_system(row: dict[str, Any], turns: list[Turn], column: str = "system") -> list[Turn]:
    """The turns after the system message of a column of its own; one that stands among the turns goes before it."""
    if not row.get(column) or _is_blank(row[column]) or (turns and turns[0].role == "system"):
        return turns
    return [Turn("system", row[column]), *turns]


def _is_blank(content: Any) -> bool:
    """Whether a content, a text or typed parts, is white space."""
    texts = [
        part.get("text") if isinstance(part, dict) else part
        for part in (content if isinstance(content, list) else [content])
    ]
    return all(isinstance(text, str) and not text.strip() for text in texts)


def sample_of(row: Any, index: int, turn: int, name: str, layout: Layout) -> Sample:
    """The sample of the row's answer `turn`. name: its id where the row has none."""
    if not isinstance(row, dict):
        raise BadSample(f"expected {layout.shape}, found {describe(row)}")
    turns = layout.talk(row)
    messages = layout.build(row, turns)
    answers = [k for k, turn in enumerate(turns) if turn.is_answer]
    if not answers:
        raise BadSample("the row has no answer: none of its messages is the assistant's and bears loss")
    kept = messages[: answers[turn] + 1]
    _check_order(kept)
    kept = [_plain(m) for m in kept[:-2]] + [_with_question(m) for m in kept[-2:-1]] + kept[-1:]
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise BadSample(f"'meta' must be an object, found {describe(meta)}")
    extra = {key: value for key, value in row.items() if key not in layout.uses | {"id", "meta"}}
    name = str(row["id"]) if row.get("id") is not None else name
    return Sample(
        id=name if len(answers) == 1 else f"{name}#{turn}",
        messages=tuple(kept),
        source=layout.name,
        row=index,
        meta={**extra, **meta},
    )


def _parse(raw: Raw, index: int, layout: Layout) -> Sample:
    row = value_of(raw)
    try:
        return sample_of(row, index, raw.turn, str(raw.line or raw.number - 1), layout)
    except BadSample as error:
        raise BadSample(f"{raw.place}: {error}") from None


def _check_order(messages: list[Message]) -> None:
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for k, message in enumerate(turns):
        expected = "assistant" if k % 2 else "user"
        if message.role != expected:
            raise BadSample(
                f"user and assistant must take turns; expected the {expected} as turn {k}, found the {message.role}"
            )
    for k, message in enumerate(messages):
        if message.role == "assistant" and not message.text.strip():
            raise BadSample(f"message {k}: the answer is empty; expected a text")
        if not message.content:
            raise BadSample(f"message {k}: holds neither text nor media")


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
