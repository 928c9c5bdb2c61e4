"""Which hidden states of a network are its features: one, or several side by side.

States are counted as transformers counts them: 0 is what the first block reads, k what block k gives; negative numbers
count from the last block. A list joins the states along the feature axis in the order of the list, so that the width is
that of one state times the list's length: layer [-2, 5] gives every patch its vector of state -2, then that of state 5.
Blocks that no chosen state needs are not run (transformers' models keep one more).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from encoders.errors import EncoderError, nearest

Layers = int | list[int]
FEATURES = ("patch", "cls")


def choose_layers(layer: Layers, blocks: int, first: int = 0) -> list[int]:
    """The states' numbers from the front, each between `first` and `blocks`. Raises EncoderError for any other."""
    layers = [layer] if isinstance(layer, int) else list(layer)
    if not layers:
        raise EncoderError("layer: expected a number or a list of numbers, found an empty list")
    found = [number + blocks + 1 if number < 0 else number for number in layers]
    for number, index in zip(layers, found, strict=True):
        if not first <= index <= blocks:
            known = f"{first} to {blocks}, or -1 to {first - blocks - 1}"
            raise EncoderError(f"layer {number}: this encoder has hidden states {known}")
    return found


def join_states(states: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    """The chosen ones of the states (F,P,C) side by side: (F,P,C * len(chosen))."""
    return states[chosen[0]] if len(chosen) == 1 else torch.cat([states[index] for index in chosen], dim=-1)


def check_features(name: str) -> str:
    """`name` if it is "patch" or "cls": which positions of a state are the features."""
    if name not in FEATURES:
        raise EncoderError(f"unknown features '{name}'{nearest(name, FEATURES)}")
    return name
