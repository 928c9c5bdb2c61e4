"""Routing: positions of the keys, what is text, what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch

from mokamm.routing import AdapterError, Routing

IDS = torch.tensor([[0, 1, 1, 0, 2, 0], [0, 0, 0, 0, -1, -1]])
KEYS = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()


def test_keys_become_positions() -> None:
    routing = Routing(IDS, KEYS)
    assert routing.shape == (2, 6)
    assert routing.key_index[0].tolist() == [0, 5]
    assert routing.key_valid.tolist() == [[True, True], [False, False]]


def test_given_positions_are_taken_as_they_are() -> None:
    index, valid = torch.tensor([[5, 0, 0], [0, 0, 0]]), torch.tensor([[True, True, False], [False, False, False]])
    routing = Routing(IDS, KEYS, key_index=index, key_valid=valid)
    assert routing.key_index is index
    assert routing.key_valid is valid


@pytest.mark.parametrize("given", [False, True])
def test_a_batch_without_any_key_has_one_that_does_not_count(given: bool) -> None:
    empty = torch.zeros(2, 0, dtype=torch.int64)
    extra = {"key_index": empty, "key_valid": empty.bool()} if given else {}
    routing = Routing(IDS, torch.zeros_like(KEYS), **extra)
    assert routing.key_index.shape == (2, 1)
    assert not routing.key_valid.any()
    assert torch.isfinite(routing.key_bias(torch.float16)).all()
    assert not routing.media(3, torch.float32).any()


def test_selection_and_media() -> None:
    routing = Routing(IDS, KEYS)
    own = routing.selection(3, torch.float64, 2.0)[..., 0]
    assert own[0].argmax(-1).tolist() == [0, 1, 1, 0, 2, 0]
    assert own[1, 4:].abs().sum() == 0
    assert own.sum() == 2.0 * 10
    assert routing.any_media(3, torch.float64)[..., 0].tolist() == [[0, 1, 1, 0, 1, 0], [0] * 6]
    less = routing.selection(3, torch.float64, 2.0, less_text=True)[..., 0]
    assert torch.equal(less, own - torch.tensor([2.0, 0, 0]))
    assert routing.selection(3, torch.float64, 2.0) is routing.selection(3, torch.float64, 2.0)


def test_repeated_rows_and_views() -> None:
    routing = Routing(IDS, KEYS)
    beams = routing.view(6, torch.device("cpu"))
    assert torch.equal(beams.modality_ids, IDS.repeat_interleave(3, 0))
    assert torch.equal(beams.key_index, routing.key_index.repeat_interleave(3, 0))
    assert routing.view(6, torch.device("cpu")) is beams
    assert routing.view(2, torch.device("cpu")) is routing
    assert routing.to("cpu").shape == routing.shape
    assert pickle.loads(pickle.dumps(routing)).shape == routing.shape


def test_what_generation_asks_first_may_be_trained_with_later() -> None:
    routing = Routing(IDS, KEYS)
    with torch.inference_mode():
        beams, tiled = routing.view(6, torch.device("cpu")), routing.tiled(2)
    for made in (beams, tiled):
        assert not made.modality_ids.is_inference()
        assert not made.key_index.is_inference()


@pytest.mark.parametrize(
    ("ids", "keys", "extra", "message"),
    [
        (IDS.float(), KEYS, {}, "integers"),
        (IDS[0], KEYS[0], {}, r"\(B,T\)"),
        (IDS, KEYS[:, :-1], {}, "key_mask"),
        (IDS, KEYS.long(), {}, "bool"),
        (IDS, None, {}, "key_mask"),
        (IDS - 1, KEYS, {}, "-2"),
        (IDS, KEYS, {"key_index": torch.zeros(2, 1, dtype=torch.int64)}, "both or neither"),
        (IDS, KEYS, {"key_index": torch.zeros(3, 1), "key_valid": torch.zeros(3, 1)}, "key_index must be"),
    ],
)
def test_what_is_refused(ids: torch.Tensor, keys: torch.Tensor, extra: dict, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        Routing(ids, keys, **extra)


def test_a_modality_that_the_adapter_lacks() -> None:
    with pytest.raises(AdapterError, match="modality_ids holds 2, but the adapter has 2"):
        Routing(IDS, KEYS).selection(2, torch.float32)
