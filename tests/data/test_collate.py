"""The collated batch against a plain loop over tokens, for random examples of every shape."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.collate import collate, consolidated
from data.schema import Example, MediaInput, Message, Sample, Text

PAD = 99


@st.composite
def examples(draw):
    """Random tokens with random media spans: [start] tokens [end] [text] ..., with or without boundaries."""
    made = []
    for name in range(draw(st.integers(1, 4))):
        modality_ids, keys, media = [0], [draw(st.booleans())], []
        for _ in range(draw(st.integers(0, 3))):
            which = draw(st.integers(1, 2))
            counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
            boundaries = draw(st.booleans())
            modality_ids += [0] * boundaries
            media.append(MediaInput(("vision", "audio")[which - 1], counts, len(modality_ids), boundaries))
            modality_ids += [which] * sum(counts) + [0] * boundaries
            text = draw(st.lists(st.booleans(), max_size=4))
            keys += [False] * (len(modality_ids) - len(keys)) + text
            modality_ids += [0] * len(text)
        size = len(modality_ids)
        tokens = draw(st.lists(st.integers(0, 50), min_size=size, max_size=size))
        sample = Sample(str(name), (Message("user", (Text("?"),)), Message("assistant", (Text("!"),))))
        ids = torch.tensor(tokens)
        made.append(
            Example(ids, ids.where(ids > 25, -100), torch.tensor(modality_ids), torch.tensor(keys), media, sample)
        )
    return made


@settings(max_examples=150, deadline=None)
@given(rows=examples(), side=st.sampled_from(["left", "right"]))
def test_against_a_plain_loop(rows, side):
    batch = collate(rows, PAD, side)
    width = max(len(row.input_ids) for row in rows)
    most = max(1, max(int(row.key_mask.sum()) for row in rows))
    assert batch["key_index"].shape == batch["key_valid"].shape == (len(rows), most)
    expected_media: dict[str, dict[str, list]] = {}
    for b, row in enumerate(rows):
        size = len(row.input_ids)
        shift = width - size if side == "left" else 0
        for t in range(width):
            inside = shift <= t < shift + size
            assert batch["input_ids"][b, t] == (row.input_ids[t - shift] if inside else PAD)
            assert batch["labels"][b, t] == (row.labels[t - shift] if inside else -100)
            assert batch["modality_ids"][b, t] == (row.modality_ids[t - shift] if inside else -1)
            assert batch["key_mask"][b, t] == (row.key_mask[t - shift] if inside else False)
            assert batch["attention_mask"][b, t] == int(inside)
        positions = [t for t in range(width) if batch["key_mask"][b, t]]
        assert batch["key_index"][b].tolist() == positions + [0] * (most - len(positions))
        assert batch["key_valid"][b].tolist() == [True] * len(positions) + [False] * (most - len(positions))
        for item in row.media:
            group = expected_media.setdefault(item.modality, {"items": [], "token": [], "start": [], "end": []})
            first = b * width + shift + item.start
            group["items"].append(item)
            group["token"] += range(first, first + sum(item.counts))
            if item.boundaries:
                group["start"].append(first - 1)
                group["end"].append(first + sum(item.counts))
    assert batch["media"].keys() == expected_media.keys()
    for modality, group in expected_media.items():
        got = batch["media"][modality]
        assert all(a is b for a, b in zip(got.items, group["items"], strict=True))
        assert got.token_index.tolist() == group["token"]
        assert got.start_index.tolist() == group["start"]
        assert got.end_index.tolist() == group["end"]
        flat = batch["modality_ids"].flatten()
        assert (flat[got.token_index] == {"vision": 1, "audio": 2}[modality]).all()
        assert (flat[torch.cat([got.start_index, got.end_index])] == 0).all()
        assert {t.dtype for t in (got.token_index, got.start_index, got.end_index)} == {torch.int64}
    assert batch["samples"] == [row.sample for row in rows]
    assert {batch[k].dtype for k in ("input_ids", "labels", "modality_ids", "attention_mask", "key_index")} == {
        torch.int64
    }


def example(media: list[MediaInput], size: int = 4) -> Example:
    zeros = torch.zeros(size, dtype=torch.int64)
    return Example(zeros, zeros, zeros, zeros.bool(), media, Sample("s7", (Message("user", (Text("?"),)),)))


def test_no_key_at_all_still_gives_one_column():
    batch = collate([example([])], PAD)
    assert batch["key_index"].tolist() == [[0]]
    assert batch["key_valid"].tolist() == [[False]]
    assert batch["media"] == {}


def test_impossible_examples_are_refused():
    with pytest.raises(ValueError, match="at least one example"):
        collate([], PAD)
    with pytest.raises(ValueError, match="'middle'"):
        collate([example([])], PAD, "middle")
    for item in (
        MediaInput("audio", [2], 0),
        MediaInput("audio", [2], 2),
        MediaInput("audio", [5], 0, boundaries=False),
    ):
        with pytest.raises(ValueError, match="sample s7: audio tokens"):
            collate([example([item])], PAD)


def test_a_batch_can_be_sent_between_processes():
    batch = collate([example([MediaInput("audio", [1, 1], 1)])], PAD)
    again = pickle.loads(pickle.dumps(batch))
    assert torch.equal(again["media"]["audio"].token_index, batch["media"]["audio"].token_index)


def test_a_consolidated_batch_is_the_same_in_one_storage_for_each_dtype():
    def media() -> list[MediaInput]:
        seen = MediaInput("vision", [2], 2, segments=torch.arange(24, dtype=torch.uint8).view(1, 3, 2, 4))
        heard = MediaInput("audio", [1], 6, features=torch.randn(1, 2, 5), mask=torch.tensor([[True, False]]))
        heard.lengths = torch.tensor([7])
        return [seen, heard]

    sample = Sample("0", (Message("user", (Text("?"),)), Message("assistant", (Text("!"),))))
    ids, keys = torch.arange(9), torch.arange(9) == 8
    torch.manual_seed(0)
    one = collate([Example(ids, ids, torch.zeros_like(ids), keys, media(), sample)] * 3, PAD)
    torch.manual_seed(0)
    batch = consolidated(collate([Example(ids, ids, torch.zeros_like(ids), keys, media(), sample)] * 3, PAD))
    pairs = [(one[name], batch[name]) for name in one if name not in ("media", "samples")]
    for name, expected in one["media"].items():
        found = batch["media"][name]
        pairs += [(getattr(expected, f), getattr(found, f)) for f in ("token_index", "start_index", "end_index")]
        for a, b in zip(expected.items, found.items, strict=True):
            pairs += [(getattr(a, f), getattr(b, f)) for f in ("segments", "lengths", "features", "mask")]
    tensors = [(a, b) for a, b in pairs if a is not None]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in tensors)
    assert all(b is None for a, b in pairs if a is None)
    storages = {b.untyped_storage().data_ptr() for _, b in tensors if b.numel()}
    assert len(storages) == len({b.dtype for _, b in tensors}) == 4
