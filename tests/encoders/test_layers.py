"""Which hidden states: numbers, lists, errors."""

from __future__ import annotations

import pytest
import torch

from encoders.base import EncoderError
from encoders.layers import choose_layers, join_states


def test_numbers_count_as_in_a_list_of_hidden_states() -> None:
    states = [torch.full((2, 3, 1), float(i)) for i in range(5)]  # embedding and four blocks
    for layer in range(-5, 5):
        assert join_states(states, choose_layers(layer, 4)) is states[layer]
    assert choose_layers([-1, 0, 2], 4) == [4, 0, 2]


def test_a_list_joins_along_the_width_in_its_order() -> None:
    states = torch.randn(5, 2, 3, 4)
    joined = join_states(list(states), choose_layers([3, -5, 3], 4))
    assert joined.shape == (2, 3, 12)
    assert torch.equal(joined[..., :4], states[3])
    assert torch.equal(joined[..., 4:8], states[0])
    assert torch.equal(joined[..., 8:], states[3])


@pytest.mark.parametrize(
    ("layer", "first", "message"),
    [
        (5, 0, "layer 5: this encoder has hidden states 0 to 4, or -1 to -5"),
        (-6, 0, "layer -6"),
        ([1, 9], 0, "layer 9"),
        (0, 1, "hidden states 1 to 4, or -1 to -4"),
        ([], 0, "an empty list"),
    ],
)
def test_out_of_range(layer, first: int, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        choose_layers(layer, 4, first)
