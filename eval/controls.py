"""Controls: the same questions with something taken away, to see what the answers rest on.

- blind         no media: what can be guessed from the question alone
- shuffle       every row is shown the media of another row, of the same kinds: media that look right but are not
- base          the same model before stage 2: no adapter, the projectors of `training.init_from`
- adapter:NAME  one modality's adapter path is off at prefill: its tokens pass the frozen LLM only, as in the paper

`blind` and `shuffle` change the samples, `base` changes what is loaded, `adapter:NAME` changes the routing.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.schema import PADDING, Batch, Media, Message, Sample, UserError, nearest

SEED = 0
CONTROLS = ("blind", "shuffle", "base", "adapter:NAME")


@dataclass(frozen=True)
class Control:
    """kind: "" (none), blind, shuffle, base or adapter; modality: of adapter:NAME."""

    kind: str = ""
    modality: str = ""

    @classmethod
    def named(cls, text: str | None, modalities: Sequence[str]) -> Control:
        """Read the command line's word; `modalities` are those of the run's model, text first."""
        if not text:
            return cls()
        kind, colon, modality = text.partition(":")
        if kind not in {name.partition(":")[0] for name in CONTROLS} or bool(colon) != (kind == "adapter"):
            raise UserError(f"there is no control '{text}'{nearest(text, CONTROLS)}")
        if kind == "adapter" and modality not in modalities:
            raise UserError(f"control {text}: the run has no modality '{modality}'{nearest(modality, modalities)}")
        return cls(kind, modality)

    @property
    def suffix(self) -> str:
        """What the names of its files carry; nothing for a plain evaluation."""
        return "".join(["." + self.kind if self.kind else "", "-" + self.modality if self.modality else ""])

    @property
    def name(self) -> str | None:
        """As on the command line; None for a plain evaluation."""
        return f"{self.kind}:{self.modality}" if self.modality else self.kind or None

    def apply(self, samples: list[Sample]) -> list[Sample]:
        """The samples that the model is asked under this control, in the same order."""
        if self.kind == "blind":
            return [without_media(sample) for sample in samples]
        return shuffle_media(samples) if self.kind == "shuffle" else samples

    def reroute(self, batch: Batch, modalities: Sequence[str]) -> Batch:
        """Under adapter:NAME, the batch with that modality's tokens routed as padding: no adapter path, all else stays.

        The question's keys stay too, also under adapter:text.
        """
        if self.kind != "adapter":
            return batch
        ids = batch["modality_ids"]
        number = modalities.index(self.modality)
        return {**batch, "modality_ids": ids.masked_fill(ids == number, PADDING)}  # type: ignore[typeddict-item]


def without_media(sample: Sample) -> Sample:
    """The sample with its text only."""
    texts = (tuple(part for part in message.content if not isinstance(part, Media)) for message in sample.messages)
    pairs = zip(sample.messages, texts, strict=True)
    return replace(sample, messages=tuple(replace(message, content=content) for message, content in pairs))


def shuffle_media(samples: Sequence[Sample]) -> list[Sample]:
    """Give every sample the media of another one with the same kinds of media, and none of them its own.

    Every sample's media are used exactly once. Samples without media stay as they are. Raises UserError where no such
    exchange exists (too many of the rows are about one clip).
    """
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        if sample.media:
            kinds[tuple((media.kind, media.modality) for media in sample.media)].append(i)
    shuffled = list(samples)
    generator = random.Random(SEED)
    for kind, members in sorted(kinds.items()):
        paths = [tuple(media.path for media in samples[i].media) for i in members]
        donors = _derange(paths, generator)
        if donors is None:
            names = " + ".join(modality for _, modality in kind)
            raise UserError(
                f"control shuffle: too many of the {len(members)} rows with {names} share one clip or picture, "
                "so that some row would meet its own media again; raise --limit, or leave it out"
            )
        for i, donor in zip(members, donors, strict=True):
            shuffled[i] = with_media(samples[i], samples[members[donor]].media)
    return shuffled


def _derange(paths: list[tuple[str, ...]], generator: random.Random) -> list[int] | None:
    """A permutation under which no place receives a path that it had, or None.

    Rows are laid out clip by clip, clips in random order, and moved on by the size of the largest clip. Rows that share
    only some of their media (one clip, two spoken questions) may still meet: each of those swaps with a place that
    suits both.
    """
    clips: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, own in enumerate(paths):
        clips[tuple(sorted(own))].append(i)  # two pictures in either order
    groups = list(clips.values())
    generator.shuffle(groups)
    order = [i for group in groups for i in group]
    step = max(len(group) for group in groups)
    donors = [0] * len(paths)
    for place, i in enumerate(order):
        donors[i] = order[(place + step) % len(order)]

    def suits(i: int, donor: int) -> bool:
        return set(paths[i]).isdisjoint(paths[donor])

    for i in order:
        if suits(i, donors[i]):
            continue
        others = generator.sample(order, len(order))
        j = next((j for j in others if suits(i, donors[j]) and suits(j, donors[i])), None)
        if j is None:
            return None
        donors[i], donors[j] = donors[j], donors[i]
    return donors


def with_media(sample: Sample, media: Sequence[Media]) -> Sample:
    """The sample with its media replaced one by one."""
    given = iter(media)

    def exchanged(message: Message) -> Message:
        return replace(message, content=tuple(next(given) if isinstance(p, Media) else p for p in message.content))

    return replace(sample, messages=tuple(exchanged(message) for message in sample.messages))
