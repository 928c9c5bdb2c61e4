"""Frozen perception: media segments to features, from the cache where it has them.

    worker:        Media --lookup--> features (cache hit) | None  -> the loader decodes segments instead
    main process:  batch --fill----> items that still have segments get features (F,P,C) + mask (F,P); cache written

It is no nn.Module and stands outside the module that DeepSpeed shards: each rank holds the encoders whole, so the
number of encoder calls may differ between ranks without any of them waiting for the others.
Cost: one encoder call a batch and modality, without gradient; of sounds one for each length of windows.

Axis letters: F segments, P patches, C feature width, S audio samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.media import SAMPLE_RATE, MediaLoader
from data.schema import Batch, Media, MediaInput, UserError
from encoders.base import Encoder, Extent, Features
from encoders.cache import FeatureCache
from mokamm.config_sections import ModalityConfig
from mokamm.projectors import Projector


@dataclass(frozen=True)
class Sense:
    """What the processor must know of a modality to lay out a sample before anything is encoded."""

    name: str
    kind: str  # "frames" or "waveform"
    segments: int
    seconds: float  # of one window; 0 for frames
    whole: bool  # speech: a sound too long for its windows is refused, never thinned out
    boundaries: bool
    patches: Callable[[Extent], int]  # valid samples of a window, (height, width) of a frame -> valid patches
    tokens: Callable[[int], int]  # valid patches -> media tokens

    @classmethod
    def of(cls, name: str, config: ModalityConfig, encoder: Encoder, projector: Projector) -> Sense:
        # None: the encoder's own window, or a second, as the paper's audio segments
        seconds = config.seconds or encoder.window_samples / SAMPLE_RATE
        if encoder.max_samples is not None and round(seconds * SAMPLE_RATE) > encoder.max_samples:
            raise UserError(
                f"model.modalities.{name}.seconds is {seconds:g}, but encoder '{config.encoder.name}' reads windows of "
                f"at most {encoder.max_samples / SAMPLE_RATE:g} s; longer sound becomes several windows (`segments`)"
            )
        return cls(
            name=name,
            kind=encoder.modality_kind,
            segments=config.segments,
            seconds=0.0 if encoder.modality_kind == "frames" else float(seconds),
            whole=name == "speech",
            boundaries=config.boundaries,
            patches=encoder.num_tokens,
            tokens=projector.num_tokens,
        )

    @property
    def most_patches(self) -> int:
        """The valid patches of a full segment."""
        return self.patches(None if self.kind == "frames" else round(self.seconds * SAMPLE_RATE))

    def most_tokens(self, kind: str) -> int:
        """The media tokens of an item with all its segments full; of an image, one segment."""
        return (1 if kind == "image" else self.segments) * self.tokens(self.most_patches)

    def preprocessing(self, media: Media) -> str:
        """What beside file and encoder decides the features: part of the cache key."""
        return f"{media.kind} segments={self.segments} seconds={self.seconds} whole={self.whole}"


class Perception:
    """The encoders of a model, by modality, and the cache of their features."""

    def __init__(self, encoders: Mapping[str, Encoder], cache: FeatureCache | None = None) -> None:
        self.encoders = dict(encoders)
        self.cache = cache
        # hashing all weights is done once and here, not in every worker
        self._fingerprints = {name: encoder.fingerprint() for name, encoder in self.encoders.items()} if cache else {}

    def to(self, device: torch.device | str) -> Perception:
        for encoder in self.encoders.values():
            encoder.to(device)
        return self

    def lookup(self, sense: Sense, media: Media, loader: MediaLoader) -> tuple[str | None, Features | None]:
        """The cache key of a media item and, where the cache holds them, its features. Raises MediaError."""
        if self.cache is None:
            return None, None
        key = self.cache.key(loader.fingerprint(media), self._fingerprints[sense.name], sense.preprocessing(media))
        return key, self.cache.get(key)

    def fill(self, batch: Batch) -> None:
        """Encode, in place, every item of the batch that holds segments; afterwards all items hold features."""
        for modality, media in batch["media"].items():
            self._encode(modality, [item for item in media.items if item.segments is not None])

    def _encode(self, modality: str, items: list[MediaInput]) -> None:
        """Segments of one shape are one lot for the encoder."""
        by_shape: dict[tuple[int, ...], list[MediaInput]] = defaultdict(list)
        for item in items:
            assert item.segments is not None
            by_shape[tuple(item.segments.shape[1:])].append(item)
        lots = list(by_shape.values())
        for lot, (features, mask) in zip(lots, self._encoded(self.encoders[modality], lots), strict=True):
            self._hand_out(lot, features, mask)

    def _encoded(self, encoder: Encoder, lots: list[list[MediaInput]]) -> list[Features]:
        """Of each lot of items, whose segments have equal shapes."""
        segments = [torch.cat([item.segments for item in items if item.segments is not None]) for items in lots]
        if encoder.modality_kind == "frames":
            return encoder.encode_frames(segments)
        known = [[item.lengths for item in items if item.lengths is not None] for items in lots]
        lengths = [torch.cat(lot) if lot else None for lot in known]
        return [encoder.encode(*lot) for lot in zip(segments, lengths, strict=True)]

    def _hand_out(self, items: list[MediaInput], features: Tensor, mask: Tensor) -> None:
        """Features of the segments of all items, one after another, to the items and into the cache."""
        sizes = [len(item.counts) for item in items]
        parts = zip(features.split(sizes), mask.split(sizes), strict=True)
        for item, (item_features, item_mask) in zip(items, parts, strict=True):
            item.features, item.mask, item.segments, item.lengths = item_features, item_mask, None, None
            if self.cache is not None and item.key is not None:
                self.cache.put(item.key, Features(*_trim(item_features.cpu(), item_mask.cpu())))


def _trim(features_FPC: Tensor, mask_FP: Tensor) -> tuple[Tensor, Tensor]:
    """Without the padding that only longer segments of the same call needed."""
    longest = int(mask_FP.sum(1).max())
    return features_FPC[:, :longest].contiguous(), mask_FP[:, :longest].contiguous()
