"""Masks of LoRI: which entries of every layer's B are kept.

    mask = keep_top(names, read_b, sparsity=0.9)     over all layers together, exactly round((1 - sparsity) * entries)
    mask.check(layers)                               AdapterError where it belongs to another model

An entry is kept if its magnitude is among the largest of all layers and projections together (LoRI, arXiv 2504.07448);
between equals the earlier one goes first, in the order of the names and within a layer row by row. A threshold alone
would keep too many where B holds equal numbers (bfloat16, or a B that is sparse already).

The exact threshold is found by counting, not by sorting: magnitudes as float32 are ordered like their bits, so a histogram
of the upper 16 bits gives the bin of the threshold, and one of the lower 16 bits within that bin the threshold itself.
Cost: three reads of every B, one layer in memory at a time. A bit an entry; bit i of byte j is entry 8 j + i, row by row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mokamm.routing import AdapterError

Shape = tuple[int, int]
INFINITE = 0x7F800000  # the bits of float32's infinity
SHOWN = 4


@dataclass(frozen=True)
class Mask:
    """bits: packed, by the layers' names in the LLM; shapes: of B; a_hash: of the A that B was trained with, if known."""

    bits: dict[str, Tensor]
    shapes: dict[str, Shape]
    a_hash: str | None = None

    @property
    def kept(self) -> int:
        return sum(count(bits) for bits in self.bits.values())

    @property
    def total(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.total

    def digest(self) -> str:
        """sha256 of which entries are kept."""
        found = hashlib.sha256()
        for name in sorted(self.bits):
            found.update(f"{name} {self.shapes[name]}\n".encode())
            found.update(self.bits[name].cpu().contiguous().numpy().data)
        return found.hexdigest()

    def check(self, layers: dict[str, Shape]) -> None:
        """layers: the shapes of B by the adapted layers' names. Raises AdapterError where they are not the mask's."""
        problems = [f"the model adapts {name}, the mask does not know it" for name in layers if name not in self.bits]
        problems += [f"the mask knows {name}, the model does not adapt it" for name in self.bits if name not in layers]
        problems += [
            f"{name}: B is {layers[name]}, the mask is for {shape}"
            for name, shape in self.shapes.items()
            if name in layers and layers[name] != shape
        ]
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            listed = "\n  - ".join([*problems[:SHOWN], *more])
            raise AdapterError(
                f"The mask belongs to another model, rank or choice of modules:\n  - {listed}\n"
                "Cut one from a LoRI-D adapter of this very model and rank: mokamm lori-mask RUN --out FILE."
            )


def keep_top(
    layers: dict[str, Shape], read: Callable[[str], Tensor], sparsity: float, a_hash: str | None = None
) -> Mask:
    """The mask that keeps the largest magnitudes of all layers together.

    layers: shapes of B, in any order. read(name): that layer's B (out_features, columns), floating point.
    Raises AdapterError for a sparsity outside (0, 1), a B of another shape, or values that are not finite or all zero.
    """
    if not 0.0 < sparsity < 1.0:
        raise AdapterError(f"sparsity must lie between 0 and 1, both left out; found {sparsity!r}.")
    names = sorted(layers)
    keep = max(1, round((1 - sparsity) * sum(math.prod(layers[name]) for name in names)))
    high = torch.zeros(2**16, dtype=torch.int64)
    for name in names:
        bits = _magnitude(name, read(name), layers[name])
        if bool((bits >= INFINITE).any()):
            raise AdapterError(f"{name}: B holds values that are not finite; no mask can be cut from it.")
        high += torch.bincount(bits >> 16, minlength=2**16)
    upper, above = _place(high, keep)
    low = torch.zeros(2**16, dtype=torch.int64)
    for name in names:
        bits = _magnitude(name, read(name), layers[name])
        low += torch.bincount(bits[bits >> 16 == upper] & 0xFFFF, minlength=2**16)
    lower, within = _place(low, keep - above)
    threshold, equals = (upper << 16) + lower, keep - above - within
    if threshold == 0 and above + within == 0:
        raise AdapterError("B is zero everywhere, as before any training; train the LoRI-D adapter first.")
    packed = {}
    for name in names:
        bits = _magnitude(name, read(name), layers[name])
        kept, equal = bits > threshold, bits == threshold
        kept |= equal & (equal.cumsum(0) <= equals)
        equals -= int(equal.sum())  # below zero where none is left to keep
        packed[name] = pack(kept)
    return Mask(packed, {name: layers[name] for name in names}, a_hash)


def _magnitude(name: str, B: Tensor, shape: Shape) -> Tensor:
    """|B| as the bits of float32, which are ordered like it; flat."""
    if tuple(B.shape) != tuple(shape):
        raise AdapterError(f"{name}: B is {tuple(B.shape)}, expected {tuple(shape)}.")
    return B.detach().to("cpu", torch.float32).abs().contiguous().view(torch.int32).flatten()


def _place(histogram: Tensor, keep: int) -> tuple[int, int]:
    """The bin that the keep-th largest lies in, and how many lie in the bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, torch.tensor(keep)))
    place = min(place, len(histogram) - 1)
    return len(histogram) - 1 - place, int(from_top[place - 1]) if place else 0


# ---- bits ------------------------------------------------------------------------------------------------------------


def pack(kept: Tensor) -> Tensor:
    """Booleans of any shape as bytes, eight a byte."""
    flat = kept.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, entries: int) -> Tensor:
    """(entries,) bool."""
    steps = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1).bitwise_right_shift(steps) & 1).flatten()[:entries].bool()


def count(bits: Tensor) -> int:
    """How many bits are set."""
    return int(unpack(bits, 8 * len(bits)).sum())


def tidy(name: str, mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A packed mask as read from a file, checked: AdapterError where its length is not that of B, or spare bits are set."""
    entries = math.prod(shape)
    spare = int(mask[-1]) >> (entries % 8) if entries % 8 and len(mask) else 0
    if mask.dtype != torch.uint8 or mask.shape != (-(-entries // 8),) or spare:
        raise AdapterError(
            f"{name}: its mask ({tuple(mask.shape)} {mask.dtype}) is not one of a B of shape {tuple(shape)}; the file is "
            "of another model or rank, or damaged."
        )
    return mask
