"""Processor: one sample's messages and media to input ids, labels, modality ids and keys.

    Sample --chat template--> ids        t t t  s v v v v e  t t  a a        s, e: boundary vectors
                              modality   0 0 0  0 1 1 1 1 0  0 0  0 0        v, s, e: `pad_id` in input_ids
                              keys                           1 1             labels: only at a

- Media positions hold the pad id, which is never embedded there. They are counted exactly, from the encoder's valid
  patches and the projector's tokens, before anything is cut; only an over-long answer is ever cut.
- The prompt's ids are the same in training and at inference, and a prefix of the training row.
- It runs in the data loader's workers: decoding happens here, encoding does not; a cache hit decodes nothing.
Cost: decoding the media, a few milliseconds to seconds; tokenising, below one.

Axis letters: T tokens, F segments, S audio samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any, Literal

import torch

from data.media import MediaLoader
from data.schema import IGNORED, BadSample, Example, Media, MediaInput, Sample
from encoders.base import Features
from mokamm.perception import Sense
from mokamm.rendering import ChatRenderer, Piece

Lookup = Callable[[Sense, Media, MediaLoader], tuple[str | None, Features | None]]


class Processor:
    """Turns samples into examples. Raises BadSample (a MediaError for a medium) where a sample cannot be used."""

    def __init__(
        self,
        tokenizer: Any,
        senses: Mapping[str, Sense],
        loader: MediaLoader,
        lookup: Lookup | None = None,
        max_length: int = 1024,
        keys: Literal["question", "user"] = "question",
        day: date | None = None,
        thinking: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.renderer = ChatRenderer(tokenizer, day, thinking)
        self.senses = dict(senses)
        self.modality_ids = {name: i for i, name in enumerate(("text", *self.senses))}
        self.loader = loader
        self.lookup = lookup
        self.max_length = max_length
        self.keys = keys
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_id = int(pad or 0)  # any id will do: media and padding positions are masked, not told by their id

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer: the template's end of turn and the tokenizer's end of text."""
        return self.renderer.end_ids

    def with_loader(self, loader: MediaLoader) -> Processor:
        """The same processor for media of another folder."""
        other = copy.copy(self)
        other.loader = loader
        return other

    def __call__(self, sample: Sample, for_generation: bool = False) -> Example:
        """`for_generation`: the prompt only; else prompt and answer, whose tokens alone have labels."""
        if not sample.messages or not sample.prompt:
            raise BadSample("the row has no message before the answer; expected at least one of the user's")
        messages = sample.prompt if for_generation else sample.messages
        if not for_generation and not sample.answer.strip():
            raise BadSample("the row has no answer: its last message must be the assistant's, and not empty")
        self._check_media(sample)
        rendered = self.renderer.render(messages, self.keys)
        row = _Row(self.pad_id)
        stretch: list[Piece] = []
        for piece in rendered.prompt:
            if piece.media is None:
                stretch.append(piece)
                continue
            row.text(*self.renderer.encode(stretch))
            row.media(self._perceive(piece.media), self.modality_ids[piece.media.modality])
            self._check_length(row, for_generation)
            stretch = []
        ids, is_key = self.renderer.encode(stretch)
        row.text(ids, is_key)
        self._check_length(row, for_generation)
        if not for_generation:
            row.answer(self._answer_ids(stretch, ids, rendered.answer), self.max_length)
        return row.example(sample)

    def estimate_length(self, sample: Sample) -> int:
        """About how many tokens the sample will have: its text's, and the most that the media it names can have.

        No medium is opened. Cost: tokenising.
        """
        text = "\n".join(message.text for message in sample.messages)
        return len(self.tokenizer(text)["input_ids"]) + sum(
            self.senses[media.modality].most_tokens(media.kind)
            for media in sample.media
            if media.modality in self.senses
        )

    def answer_length(self, sample: Sample) -> int:
        """How many tokens of the sample bear loss, unless data.max_length cuts them. No medium is opened."""
        rendered = self.renderer.render(sample.messages, self.keys)
        after = max((i + 1 for i, piece in enumerate(rendered.prompt) if piece.media), default=0)
        stretch = rendered.prompt[after:]
        return len(self._answer_ids(stretch, self.renderer.encode(stretch)[0], rendered.answer))

    def _answer_ids(self, stretch: Sequence[Piece], prompt_ids: list[int], answer: Sequence[Piece]) -> list[int]:
        """The answer's ids as they follow the prompt in one text, if that leaves the prompt's ids alone; else apart."""
        joint, _ = self.renderer.encode([*stretch, *answer])
        if joint[: len(prompt_ids)] == prompt_ids:
            return joint[len(prompt_ids) :]
        return self.renderer.encode(answer)[0]

    # ---- media -----------------------------------------------------------------------------------------

    def _check_media(self, sample: Sample) -> None:
        for media in sample.media:
            if media.modality not in self.senses:
                raise BadSample(f"{media.path}: {self._unperceived(media)}")
            kind = self.senses[media.modality].kind
            if (media.kind == "audio") != (kind == "waveform"):
                raise BadSample(f"{media.path}: modality '{media.modality}' perceives {kind}, found {media.kind}")

    def _unperceived(self, media: Media) -> str:
        """That the config has no modality for a medium, and which other one could perceive it."""
        others = [name for name, sense in self.senses.items() if media.kind == "audio" and sense.kind == "waveform"]
        return (
            f"unknown modality '{media.modality}', model.modalities holds {', '.join(self.senses) or 'none'}; add it there"
            + "".join(f", or have {name} perceive it ('as' in the row, audio_as of the source)" for name in others)
        )

    def _perceive(self, media: Media) -> MediaInput:
        """Cached features, or decoded segments, with the number of tokens of each segment."""
        sense = self.senses[media.modality]
        key, found = (None, None) if self.lookup is None else self.lookup(sense, media, self.loader)
        item = MediaInput(media.modality, [], start=0, boundaries=sense.boundaries, key=key)
        if found is not None:
            item.features, item.mask = found.features, found.mask
            patches = found.mask.sum(1).tolist()
        elif sense.kind == "frames":
            item.segments = self.loader.frames(media, sense.segments)
            height, width = item.segments.shape[-2:]
            patches = [sense.patches((height, width))] * len(item.segments)
        else:
            windows = self.loader.windows(media, sense.segments, sense.seconds, whole=sense.whole)
            item.segments, item.lengths = windows.samples, windows.lengths
            patches = [sense.patches(length) for length in windows.lengths.tolist()]
        item.counts = [sense.tokens(count) for count in patches]
        return item

    def _check_length(self, row: _Row, for_generation: bool) -> None:
        room = self.max_length if for_generation else self.max_length - 1
        if len(row.ids) > room:
            media = ", ".join(f"{sum(item.counts)} {item.modality}" for item in row.items) or "no media"
            raise BadSample(
                f"the prompt has {len(row.ids)} tokens or more ({media}), but data.max_length is {self.max_length}; "
                "raise it, or use fewer segments"
            )


class _Row:
    """An example under construction."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id
        self.ids: list[int] = []
        self.modalities: list[int] = []
        self.keys: list[bool] = []
        self.labels: list[int] = []
        self.items: list[MediaInput] = []

    def _append(self, ids: list[int], modality: int, keys: list[bool] | None, bears_loss: bool = False) -> None:
        self.ids += ids
        self.modalities += [modality] * len(ids)
        self.keys += keys or [False] * len(ids)
        self.labels += ids if bears_loss else [IGNORED] * len(ids)

    def text(self, ids: list[int], keys: list[bool]) -> None:
        self._append(ids, 0, keys)

    def media(self, item: MediaInput, modality: int) -> None:
        boundary = [self.pad_id] * item.boundaries
        self._append(boundary, 0, None)
        item.start = len(self.ids)
        self._append([self.pad_id] * sum(item.counts), modality, None)
        self._append(boundary, 0, None)
        self.items.append(item)

    def answer(self, ids: list[int], max_length: int) -> None:
        """The answer, cut at `max_length` (its end of turn then goes too, so that stopping early is not learned)."""
        self._append(ids[: max_length - len(self.ids)], 0, None, bears_loss=True)

    def example(self, sample: Sample) -> Example:
        return Example(
            input_ids=torch.tensor(self.ids, dtype=torch.int64),
            labels=torch.tensor(self.labels, dtype=torch.int64),
            modality_ids=torch.tensor(self.modalities, dtype=torch.int64),
            key_mask=torch.tensor(self.keys, dtype=torch.bool),
            media=self.items,
            sample=sample,
        )
