"""What a sample is, on its way from a row of some file to a batch of tensors.

    row --sources--> Sample --processor--> Example --collate--> Batch

Every format is read into `Sample`; only readers know formats, only the processor knows tokenizers.

Axis letters: B batch, T tokens, F segments (frames or windows), P patches, C feature width, S audio samples, Q keys.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict
from urllib.parse import unquote

if TYPE_CHECKING:  # importing torch takes seconds, and messages about mistakes should not wait for it
    from torch import Tensor

Role = Literal["system", "user", "assistant"]
Kind = Literal["video", "audio", "image"]
MEDIA: dict[str, tuple[Kind, str]] = {  # what columns, options and keywords call a file: its kind, and who perceives it
    "video": ("video", "vision"), "image": ("image", "vision"), "audio": ("audio", "audio"), "speech": ("audio", "speech"),
}  # fmt: skip
IGNORED = -100  # label of a token that bears no loss
PADDING = -1  # modality id of a padding token


class UserError(Exception):
    """A mistake of the user's; its message says what, where, what was expected, and what to do next."""


class BadSample(UserError):
    """One row or one medium cannot be used. A long run writes it to the ledger and goes on."""


class MediaError(BadSample):
    """A media file is missing, outside the allowed folder, over a limit, or cannot be decoded."""


class MissingMedia(MediaError):
    """There is no such media file."""


class RefusedMedia(MediaError):
    """A media path that may not be followed, or leads to no file."""


class OverLimit(MediaError):
    """A media file that is too long or too large for the configuration."""


class NoTrack(MediaError):
    """A media file without the pictures, or without the sound, that the row wants of it."""


def local_path(name: str) -> str:
    """The path of a file's URL (RFC 8089: file:///a%20b is /a b); any other name as it is."""
    return unquote(name[7:]) if name[:8].lower() == "file:///" else name


def listed(title: str, problems: Sequence[str], most: int | None = None) -> str:
    """A message with a line for each problem, or for the first `most` and one that counts the others."""
    shown = list(problems[:most])
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    return "\n  - ".join([title, *shown])


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: its nearest known one, and all that are known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{hint} known: {', '.join(names)}"


def beside(path: Path) -> tuple[str, int]:
    """Of a missing file's folder: the name that is nearest to its own, empty where none is, and how many there are.

    Looks at 10,000 of them at most.
    """
    with os.scandir(path.parent) as entries:
        names = [entry.name for entry in islice(entries, 10_000)]
    return next(iter(difflib.get_close_matches(path.name, names, n=1)), ""), len(names)


def near(path: Path) -> str:
    """The name in its folder that is nearest to that of a missing file, as the end of a message; else nothing."""
    close = ""
    with suppress(OSError):  # its folder is not there, or may not be listed
        close, _ = beside(path)
    return f"; did you mean '{close}'?" if close else ""


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text. `question` marks the span whose tokens are the keys of the cross-modal attention."""

    text: str
    question: bool = False


@dataclass(frozen=True, slots=True)
class Media:
    """A reference to one media item, not yet opened. `modality` names the encoder that perceives it."""

    kind: Kind
    path: str
    modality: str


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: tuple[Text | Media, ...]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """One training or test row: a conversation that ends with the assistant's answer, the only part that bears loss."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    row: int = -1
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        last = self.messages[-1]
        return last.text if last.role == "assistant" else ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages without the final answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def media(self) -> list[Media]:
        return [part for message in self.messages for part in message.content if isinstance(part, Media)]


@dataclass(slots=True)
class MediaInput:
    """One media item of an example: raw segments to be encoded, or features that the cache already held.

    counts: media tokens of each segment (F entries); start: position of the first of them in the example's T tokens.
    segments: uint8 (F,3,H,W) frames or float32 (F,S) windows with `lengths` (F,) valid samples.
    features: (F,P,C) with mask (F,P). key: the cache's name for these features.
    """

    modality: str
    counts: list[int]
    start: int
    boundaries: bool = True
    segments: Tensor | None = None
    lengths: Tensor | None = None
    features: Tensor | None = None
    mask: Tensor | None = None
    key: str | None = None


@dataclass(slots=True)
class Example:
    """One sample as tensors of T tokens; media positions hold the pad id and are filled by the model."""

    input_ids: Tensor
    labels: Tensor
    modality_ids: Tensor
    key_mask: Tensor
    media: list[MediaInput]
    sample: Sample


@dataclass(slots=True)
class MediaBatch:
    """All items of one modality in a batch, and where their tokens go.

    token_index (N,): flat position b*T+t of every media token, item by item, segment by segment.
    start_index, end_index: flat positions of the learned boundary vectors, one for each item that has them.
    """

    items: list[MediaInput]
    token_index: Tensor
    start_index: Tensor
    end_index: Tensor


class Batch(TypedDict):
    """B rows of examples, padded to T tokens. key_index (B,Q) lists each row's key positions, key_valid says which are real.

    Where a row may hold several examples, sample_ids (B,T) says which of its row's a token is of (padding counts as one),
    and position_ids (B,T) its place in it.
    """

    input_ids: Tensor
    labels: Tensor
    modality_ids: Tensor
    key_mask: Tensor
    attention_mask: Tensor
    key_index: Tensor
    key_valid: Tensor
    sample_ids: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    media: dict[str, MediaBatch]
    samples: list[Sample]
