"""Every row of every source once, through the processor that training uses, in the loader's workers.

Media are decoded whole, which is how a file that was cut off is found; nothing is encoded: tokens are counted from the
encoders' `num_tokens`. Rows that are too long are laid out all the same, so that their true length is known.
Cost: the decoding of an epoch, shared by the workers.
"""

from __future__ import annotations

import signal
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.dataset import Part, loaded
from data.schema import (
    IGNORED,
    BadSample,
    Example,
    Media,
    MediaError,
    MediaInput,
    MissingMedia,
    NoTrack,
    OverLimit,
    RefusedMedia,
)
from encoders.base import Encoder
from mokamm.perception import Sense

UNBOUNDED = 2**31  # max_length of the processor that walks
# the first that fits -> the trouble of a row
TROUBLE: dict[type[BadSample], str] = {
    MissingMedia: "missing",
    RefusedMedia: "refused",
    OverLimit: "limit",
    NoTrack: "track",
    MediaError: "broken",
    BadSample: "row",
}


class Item(NamedTuple):
    """A medium of a row. feature_bytes: of its features, were they cached; name: hash of its path and modality."""

    modality: str
    tokens: int
    feature_bytes: int
    name: int


class Finding(NamedTuple):
    """One row. trouble: '' or a value of TROUBLE; prompt, answer: tokens."""

    part: int
    row: int
    id: str = ""
    prompt: int = 0
    answer: int = 0
    items: tuple[Item, ...] = ()
    trouble: str = ""
    reason: str = ""


class Walk(torch.utils.data.Dataset[Finding]):
    """`limit`: so many rows of each part, evenly spread."""

    def __init__(self, parts: Sequence[Part], encoders: Mapping[str, Encoder], limit: int | None = None) -> None:
        self.parts = parts
        self.width = {name: encoder.width * encoder.dtype.itemsize for name, encoder in encoders.items()}
        rows = [_spread(len(part.rows), limit) for part in parts]
        self._part = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        self._row = np.concatenate(rows)

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Finding:
        part, row = int(self._part[index]), int(self._row[index])
        process: Any = self.parts[part].process
        try:
            sample = self.parts[part].rows[row]
        except BadSample as error:
            return Finding(part, row, trouble=_trouble(error), reason=str(error))
        try:
            example: Example = process(sample)
        except BadSample as error:
            return Finding(part, row, sample.id, trouble=_trouble(error), reason=str(error))
        answer = int((example.labels != IGNORED).sum())
        items = zip(sample.media, example.media, strict=True)
        return Finding(
            part, row, sample.id, len(example.input_ids) - answer, answer,
            tuple(self._item(media, found, process) for media, found in items),
        )  # fmt: skip

    def _item(self, media: Media, found: MediaInput, process: Any) -> Item:
        sense: Sense = process.senses[found.modality]
        assert found.segments is not None  # no cache is looked into
        *_, height, width = found.segments.shape
        extents = found.lengths.tolist() if found.lengths is not None else [(height, width)]
        patches = len(found.counts) * max(sense.patches(extent) for extent in extents)
        path = process.loader.resolve(media)
        name = zlib.crc32(f"{found.modality} {media.kind}".encode()) << 32 | zlib.crc32(str(path).encode())
        return Item(found.modality, sum(found.counts), patches * (self.width[found.modality] + 1), name)  # and the mask


def findings(walk: Walk, workers: int) -> Iterator[Finding]:
    """In any number of workers, in the order of the rows."""
    loader = DataLoader(
        walk,
        batch_size=8,
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_ctrl_c,
    )
    for batch in loaded(loader):
        yield from batch


def _leave_ctrl_c(worker: int) -> None:
    """To the main process, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _spread(rows: int, limit: int | None) -> np.ndarray:
    if limit is None or limit >= rows:
        return np.arange(rows)
    return np.arange(limit) * rows // limit


def _trouble(error: BadSample) -> str:
    return next(trouble for kind, trouble in TROUBLE.items() if isinstance(error, kind))
