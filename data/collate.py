"""Examples to a batch: pad to T tokens, and find on the CPU every position that the model will need.

Training pads on the right, generation on the left. Padding has modality id -1 and attention 0. Media stay lists of
items, because their sizes differ; what the model needs to place them are flat positions b*T + t.

Cost: one pass over the tokens, no Python loop over them.

Axis letters: B batch, T tokens, Q keys, I items of a modality, N media tokens of a modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from data.schema import IGNORED, PADDING, Batch, Example, MediaBatch, MediaInput


def collate(examples: Sequence[Example], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """Pad and join. ValueError: an empty list, an unknown side, an example whose media lie outside its tokens."""
    if not examples or side not in ("right", "left"):
        raise ValueError(
            f"collate wants at least one example and side 'right' or 'left', not {len(examples)} and {side!r}"
        )
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    width = int(lengths.max())
    shifts = (width - lengths) if side == "left" else torch.zeros_like(lengths)
    key_mask = _pad([e.key_mask for e in examples], False, side)
    key_index, key_valid = key_positions(key_mask)
    column = torch.arange(width) - shifts[:, None]
    return Batch(
        input_ids=_pad([e.input_ids for e in examples], pad_id, side),
        labels=_pad([e.labels for e in examples], IGNORED, side),
        modality_ids=_pad([e.modality_ids for e in examples], PADDING, side),
        key_mask=key_mask,
        attention_mask=((column >= 0) & (column < lengths[:, None])).long(),
        key_index=key_index,
        key_valid=key_valid,
        media=_media(examples, (torch.arange(len(examples)) * width + shifts).tolist()),
        samples=[example.sample for example in examples],
    )


def share_rows(examples: Sequence[Example], pad_id: int, one_row: bool = False) -> Batch:
    """As `collate`, padded on the right, but examples share rows: B rows as long as the longest, or a single one.

    `sample_ids` and `position_ids` tell them apart. No label stands at an example's first token: where it has a row of
    its own no token predicts it either. ValueError: as `collate`.
    """
    if not examples:
        raise ValueError("share_rows wants at least one example")
    lengths = [len(example.input_ids) for example in examples]
    rows = first_fit(lengths, sum(lengths) if one_row else max(lengths))
    batch = collate([_joined([examples[i] for i in row]) for row in rows], pad_id)
    width = batch["input_ids"].shape[1]
    parts = [[*(lengths[i] for i in row), width - sum(lengths[i] for i in row)] for row in rows]  # the last is padding
    batch["sample_ids"] = torch.stack([torch.arange(len(p)).repeat_interleave(torch.tensor(p)) for p in parts])
    batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in p]) for p in parts])
    batch["samples"] = [examples[i].sample for row in rows for i in row]
    return batch


def first_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `width`: the longest first, each in the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(width)
        rows[place].append(i)
        room[place] -= lengths[i]
    return rows


def _joined(examples: list[Example]) -> Example:
    """Examples one after another, as one that bears the first's name."""
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    starts = (lengths.cumsum(0) - lengths).tolist()
    labels = torch.cat([example.labels for example in examples])
    labels[starts] = IGNORED
    return Example(
        torch.cat([example.input_ids for example in examples]),
        labels,
        torch.cat([example.modality_ids for example in examples]),
        torch.cat([example.key_mask for example in examples]),
        [replace(item, start=item.start + t) for e, t in zip(examples, starts, strict=True) for item in e.media],
        examples[0].sample,
    )


def consolidated(batch: Batch) -> Batch:
    """The same batch, in place, its tensors views of one storage for each dtype.

    A loader's worker hands over each storage as a file descriptor, which the main process fetches from a thread of the
    worker that runs only when the worker's decoding lets it: some sixty of them a batch cost more than the copy.
    """
    groups: dict[torch.dtype, list[tuple[Tensor, Callable[[Tensor], None]]]] = {}
    for tensor, put in _slots(batch):
        groups.setdefault(tensor.dtype, []).append((tensor, put))
    for entries in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor, _ in entries])
        pieces = flat.split([tensor.numel() for tensor, _ in entries])
        for (tensor, put), piece in zip(entries, pieces, strict=True):
            put(piece.view(tensor.shape))
    return batch


def _slots(batch: Batch) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """Every tensor of a batch, and what puts another in its place."""
    values: dict[str, Any] = batch  # type: ignore[assignment]
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield value, partial(values.__setitem__, name)
    for media in batch["media"].values():
        holders: list[MediaBatch | MediaInput] = [media, *media.items]
        for holder in holders:
            for field in fields(holder):
                value = getattr(holder, field.name)
                if isinstance(value, Tensor):
                    yield value, partial(setattr, holder, field.name)


def key_positions(key_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(key_index (B,Q) int64, key_valid (B,Q) bool): each row's keys in order; Q >= 1; index 0 where not valid."""
    counts = key_mask_BT.sum(dim=1)
    valid_BQ = torch.arange(max(1, int(counts.max()))) < counts[:, None]
    rows, columns = key_mask_BT.nonzero(as_tuple=True)  # row by row, in order
    index_BQ = torch.zeros(valid_BQ.shape, dtype=torch.int64)
    index_BQ[rows, (key_mask_BT.cumsum(dim=1) - 1)[rows, columns]] = columns
    return index_BQ, valid_BQ


def _pad(rows: list[Tensor], value: int | bool, side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _media(examples: Sequence[Example], offsets: list[int]) -> dict[str, MediaBatch]:
    """Items grouped by modality, with `offsets[b]` the flat position of example b's first token."""
    groups: dict[str, list[tuple[MediaInput, int]]] = {}
    for example, offset in zip(examples, offsets, strict=True):
        for item in example.media:
            margin = 1 if item.boundaries else 0
            if item.start < margin or item.start + sum(item.counts) + margin > len(example.input_ids):
                raise ValueError(
                    f"sample {example.sample.id}: {item.modality} tokens at {item.start} + {sum(item.counts)} lie "
                    f"outside its {len(example.input_ids)} tokens"
                )
            groups.setdefault(item.modality, []).append((item, offset + item.start))
    return {modality: _media_batch(group) for modality, group in groups.items()}


def _media_batch(group: list[tuple[MediaInput, int]]) -> MediaBatch:
    starts_I = torch.tensor([start for _, start in group])
    sizes_I = torch.tensor([sum(item.counts) for item, _ in group])
    framed_I = torch.tensor([item.boundaries for item, _ in group])
    before_I = sizes_I.cumsum(0) - sizes_I  # tokens of the items before
    token_index = torch.arange(int(sizes_I.sum())) + (starts_I - before_I).repeat_interleave(sizes_I)
    return MediaBatch(
        items=[item for item, _ in group],
        token_index=token_index,
        start_index=(starts_I - 1)[framed_I],
        end_index=(starts_I + sizes_I)[framed_I],
    )
