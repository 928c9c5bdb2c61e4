"""A conversation through the tokenizer's own chat template, with every piece of it still known afterwards.

    messages --> contents become private marks --> chat template --> split at the marks --> pieces --> token ids

The template never sees the user's words, only marks (private-use characters around a number), so a message can neither
break the template nor be mistaken for a part of it, and each piece knows who wrote it: the template, the user, the
assistant. Stretches of text between two media are tokenised in one go, so that ordinary text gets the very ids that
`apply_chat_template(..., tokenize=True)` gives it. Where a control token's name (`</s>`, `<|im_end|>`) stands in
*written* text, the stretch is cut inside that name: the token is not recognised and the name stays text.
Works with any template that prints each content once; system messages join the first user turn where they are refused or
printed later. Where a template knows of thoughts (Qwen3's `<think>`), earlier answers go without theirs. `thinking`: the
prompt leaves them to the answer, whose thoughts are learned, or that it has none; else the prompt ends with none, and an
answer that has some cannot be learned. Where a template prints the day (Llama 3.2, SmolLM3), it is that of the run's first
step (resume.py).
Cost: two template renderings a sample, well below a millisecond each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

from data.schema import BadSample, Media, Message, Text, UserError

MARK = re.compile("\ue000([0-9]+)\ue001")
THOUGHT = ("<think>", "</think>")
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# for base LLMs, whose tokenizers have no template of their own (model.llm.chat_template: plain)
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered conversation. written: by a person, not by the template; key: its tokens are keys."""

    text: str = ""
    media: Media | None = None
    written: bool = False
    key: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """prompt: all that stands before the answer, as at inference; answer: from there to the end of the turn."""

    prompt: list[Piece]
    answer: list[Piece]


Turn = tuple[str, list[Piece]]


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


class ChatRenderer:
    """A tokenizer's chat template and what was found out about it. Raises UserError for one that cannot be used."""

    def __init__(self, tokenizer: Any, day: date | None = None, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self.day = day  # that the template is told; None: today
        self.template = _template_of(tokenizer)
        self.thinks, self.thinking = THOUGHT[1] in str(self.template), thinking
        if thinking and not self.thinks:
            raise UserError(f"model.llm.thinking: the tokenizer's chat template knows of no thoughts ({THOUGHT[1]})")
        self._control = _control_tokens(tokenizer, str(self.template))
        self.takes_system = self._probe_system()
        probe = self.render([Message("user", (Text("?"),)), Message("assistant", (Text("!"),))], "question")
        ends = self.encode([probe.answer[-1]])[0]
        self.end_ids = sorted({i for i in (*ends[-1:], tokenizer.eos_token_id) if i is not None})
        self._opened = f"{THOUGHT[0]}\n" if self._ending(probe.prompt[-1].text) else ""
        self._hidden = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content not in THOUGHT}

    # ---- rendering -------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], keys: Literal["question", "user"]) -> Rendered:
        """Pieces of the conversation; a final assistant message is the answer. Raises BadSample."""
        thoughts, answer = "", ""
        if messages[-1].role == "assistant":
            thoughts, answer = self._learned(messages[-1].text)
            messages = messages[:-1]
        turns = _turns([_without_thoughts(m) for m in messages] if self.thinks else messages, keys)
        if not self.takes_system:
            turns = _without_system(turns)
        parts: list[Piece] = []
        conversation = []
        for role, pieces in turns:
            marks = "".join(_mark(len(parts) + i) for i in range(len(pieces)))
            conversation.append({"role": role, "content": marks})
            parts += pieces
        text, lead, closing = self._frame(conversation, _mark(len(parts)))
        before = [Piece(lead)]
        if thoughts:
            opening, end = self._block(conversation, text, len(parts))
            before = [Piece(opening), Piece(thoughts, written=True), Piece(end)]
        return Rendered(_split(text, parts), [*before, Piece(answer, written=True), Piece(closing)])

    def _learned(self, text: str) -> tuple[str, str]:
        """Thoughts and answer of a text to be learned; all of it is the answer where no template tells them apart."""
        if not self.thinks:
            return "", text.strip()
        before, mark, answer = text.rpartition(THOUGHT[1])
        said, _, thoughts = before.rpartition(THOUGHT[0])
        if said.strip() or THOUGHT[0] in answer:
            raise BadSample(
                f"the answer holds thoughts ({' '.join(THOUGHT)}) that do not stand before all else, or have no end"
            )
        if thoughts.strip() and not self.thinking:
            raise BadSample(
                f"the answer holds thoughts ({' '.join(THOUGHT)}): they are learned where model.llm.thinking is true; set "
                "it, or take them out"
            )
        if mark and not answer.strip():
            raise BadSample("the answer holds nothing but thoughts")
        return thoughts.strip(), answer.strip()

    def _frame(self, conversation: list[dict[str, str]], answer: str) -> tuple[str, str, str]:
        """The prompt, what stands between it and the answer, and what closes the answer's turn."""
        text = self._apply(conversation, True)
        full = self._apply([*conversation, {"role": "assistant", "content": answer}], False)
        before, found, after = full.partition(answer)
        if not found:
            raise BadSample("the tokenizer's chat template does not print the assistant's answer")
        lead = before[len(text) :] if before.startswith(text) else ""
        if THOUGHT[1] not in lead:
            lead = self._ending(text) or lead
        if lead.strip() and not self.thinking:  # an empty block of thoughts: given at inference too, not learned
            text, lead = text + lead, ""
        end = self._control.search(after) if self._control else None
        return text, lead, after[: end.end()] if end else after.rstrip() + (self.tokenizer.eos_token or "")

    def _block(self, conversation: list[dict[str, str]], text: str, number: int) -> tuple[str, str]:
        """What stands before and after an answer's thoughts, as the template prints them after this prompt.

        number: of the first free mark."""
        thoughts, answer = _mark(number), _mark(number + 1)
        content = f"{THOUGHT[0]}\n{thoughts}\n{THOUGHT[1]}\n\n{answer}"
        full = self._apply([*conversation, {"role": "assistant", "content": content}], False)
        opening, found, end = full.partition(answer)[0].partition(thoughts)
        if found and opening.startswith(text):
            return opening[len(text) :], end
        ending = self._ending(text)
        return ("", ending) if ending else (f"{THOUGHT[0]}\n", f"\n{THOUGHT[1]}\n\n")

    def _ending(self, prompt: str) -> str:
        """What ends the thoughts that a prompt has begun, as those of DeepSeek's R1 do; else nothing."""
        bare = prompt.rstrip()
        space = prompt[len(bare) :]
        return f"{space}{THOUGHT[1]}{2 * space}" if self.thinks and bare.endswith(THOUGHT[0]) else ""

    def _apply(self, conversation: list[dict[str, str]], generation: bool) -> str:
        from jinja2 import TemplateError

        template = _on(self.day, self.template)
        mode = {"enable_thinking": self.thinking, "thinking": self.thinking} if self.thinks else {}
        try:
            return self.tokenizer.apply_chat_template(
                conversation, chat_template=template, tokenize=False, add_generation_prompt=generation, **mode
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in conversation)
            raise BadSample(f"the tokenizer's chat template refuses the roles {roles}: {error}") from None

    def _probe_system(self) -> bool:
        """Whether the template prints a system message once and first, as a turn or inside the first user's.

        Mistral's of 2024 print it inside the last one: there, too, it is joined to the first, where it stays as the
        conversation grows.
        """
        roles = ["system", "user", "assistant", "user"]
        turns = [{"role": role, "content": _mark(number)} for number, role in enumerate(roles)]
        try:
            found = MARK.findall(self._apply(turns, True))
            return found.count("0") == 1 and found[0] == "0"
        except BadSample:
            return False
        except Exception as error:
            raise UserError(f"the tokenizer's chat template cannot be used: {type(error).__name__}: {error}") from error

    # ---- tokenising ------------------------------------------------------------------------------------

    def encode(self, pieces: Iterable[Piece]) -> tuple[list[int], list[bool]]:
        """Token ids of a stretch of text pieces, and which tokens overlap a piece that holds keys."""
        pieces = [piece for piece in pieces if piece.text]
        text = "".join(piece.text for piece in pieces)
        ends = [0]
        for piece in pieces:
            ends.append(ends[-1] + len(piece.text))
        spans = list(zip(ends, ends[1:], pieces, strict=False))
        cuts = self._cuts(text, [(a, b) for a, b, piece in spans if piece.written])
        keys = [(a, b) for a, b, piece in spans if piece.key]
        if not self.tokenizer.is_fast:  # no offsets: a token must not reach over the end of a piece
            cuts = sorted({*cuts, *ends[1:-1]})
        ids: list[int] = []
        is_key: list[bool] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            chunk_ids, offsets = self._tokenise(text[start:end])
            ids += chunk_ids
            is_key += [any(_overlap(a + start, b + start, *span) for span in keys) for a, b in offsets]
        return ids, is_key

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated tokens, after the mark of thoughts that the prompt began; of special ones such marks alone."""
        if not self.thinks:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        return self._opened + self.tokenizer.decode([i for i in ids if i not in self._hidden])

    def _cuts(self, text: str, written: list[tuple[int, int]]) -> list[int]:
        """Where to cut `text` so that no control token is recognised that touches written text."""
        cuts = []
        match = self._control.search(text) if self._control else None
        while match:
            inside = any(a < match.end() and match.start() < b for a, b in written)
            if inside:
                cuts.append(match.start() + 1)
            match = self._control.search(text, match.start() + 1 if inside else match.end())  # type: ignore[union-attr]
        return cuts

    def _tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not text:
            return [], []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadSample(f"a text holds {text[error.start]!r}, which is no whole character (not UTF-8?)") from None
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids, [(0, len(text))] * len(ids)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]


def _template_of(tokenizer: Any) -> str:
    """The chat template: of several the one called "default". Raises UserError."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template (a base LLM?): take the LLM's chat variant, put a template beside the "
            "tokenizer as chat_template.jinja, or set model.llm.chat_template: plain (USER: ... ASSISTANT: ...)"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(f"the tokenizer's chat template cannot be used: {error}") from error


def _on(day: date | None, template: str) -> str:
    """The template, for which this day is today wherever it asks by a format that it writes out, as templates do."""
    if day is None:
        return template
    return CLOCK.sub(lambda call: f"{call[1]}{day.strftime(call[2])}{call[1]}", template)


def _control_tokens(tokenizer: Any, template: str) -> re.Pattern[str] | None:
    """The tokens that only the template may write: special ones, and added ones that the template's source holds."""
    names = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special or t.content in template}
    names |= set(tokenizer.all_special_tokens)
    longest_first = sorted((n for n in names if len(n.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _overlap(start: int, end: int, a: int, b: int) -> bool:
    """Whether a token's characters touch [a, b); a token without characters of its own counts where it stands."""
    return max(start, a) < min(end, b) or (start == end and a <= start < b)


def _turns(messages: Sequence[Message], keys: Literal["question", "user"]) -> list[Turn]:
    """Roles and pieces. keys "question": the marked text of the last user turn, all its text where none is marked;
    "user": the text of every user turn."""
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        marked = any(part.question for part in message.content if isinstance(part, Text))
        whole = message.role == "user" if keys == "user" else i == last and not marked
        pieces = [
            Piece(media=part)
            if isinstance(part, Media)
            else Piece(part.text, written=True, key=whole or (i == last and part.question))
            for part in message.content
        ]
        turns.append((message.role, _stripped(pieces)))
    return turns


def _without_thoughts(message: Message) -> Message:
    """An assistant's message without the block of thoughts before it, which a template that knows of such strips, too."""
    _, mark, said = message.text.rpartition(THOUGHT[1])
    return Message("assistant", (Text(said.strip()),)) if mark and message.role == "assistant" else message


def _stripped(pieces: list[Piece]) -> list[Piece]:
    """Without outer white space (templates trim it, but they see only marks) and without empty text."""
    if pieces:
        pieces[0] = replace(pieces[0], text=pieces[0].text.lstrip())
        pieces[-1] = replace(pieces[-1], text=pieces[-1].text.rstrip())
    return [piece for piece in pieces if piece.media or piece.text]


def _without_system(turns: list[Turn]) -> list[Turn]:
    """System messages joined to the front of the first user turn; they are instructions and never keys."""
    system = "\n\n".join(piece.text for role, pieces in turns if role == "system" for piece in pieces)
    rest = [turn for turn in turns if turn[0] != "system"]
    if system and rest and rest[0][0] == "user":
        rest[0] = ("user", [Piece(system + "\n\n", written=True), *rest[0][1]])
    return rest


def _split(rendered: str, parts: list[Piece]) -> list[Piece]:
    """The rendered text as pieces. Raises BadSample unless the template printed every part once and in order."""
    pieces, at, numbers = [], 0, []
    for match in MARK.finditer(rendered):
        pieces += [Piece(rendered[at : match.start()]), parts[int(match[1])]]
        numbers.append(int(match[1]))
        at = match.end()
    if numbers != list(range(len(parts))):
        raise BadSample("the tokenizer's chat template drops, repeats or reorders messages of this conversation")
    return [*pieces, Piece(rendered[at:])]
