"""The frozen A of LoRI: drawn from a recorded seed by a versioned generator, so that it need not be stored.

    A = draw("model.layers.0.self_attn.q_proj", (r, in_features), seed=0)        float32, the same on every machine
    digest([(name, A), ...])                                                     sha256, recorded in the adapter's config

Version 1: uniform in +-1/sqrt(in_features), as LoRA begins (Kaiming with a = sqrt 5), on a grid of at most 511 levels:
m * 2^-k with |m| <= 255. Such numbers are exact in bfloat16, float16, float32 and float64, so that A is the same whatever
dtype the LLM has, and no cast changes it. m comes from splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014) as a counter, keyed by sha256 of version, seed and the layer's name: integers only, no
library's generator, none of its state, and no layer depends on another.

Cost: about ten passes over int64 of A's size, on the CPU; some 0.1 s for 4 M entries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mokamm.routing import AdapterError

VERSION = 1


def draw(name: str, shape: tuple[int, int], seed: int, version: int = VERSION) -> Tensor:
    """A (rows, in_features) of a layer, float32 on the CPU. Raises AdapterError for a version it does not know."""
    check_version(version)
    rows, width = shape
    fraction, exponent = math.frexp(1.0 / math.sqrt(width))  # fraction in [0.5, 1)
    most = int(fraction * 256)
    levels = (_words(name, seed, version, rows * width) >> 32) & 0xFFFFFFFF
    steps = (levels * (2 * most + 1) >> 32) - most
    return (steps.to(torch.float32) * 2.0 ** (exponent - 8)).view(rows, width)


def check_version(version: int) -> None:
    """Raises AdapterError for a generator that is not known here."""
    if version != VERSION:
        raise AdapterError(
            f"A was drawn by generator version {version}; this mokamm knows version {VERSION}. Update mokamm, or let its "
            "writer store A (store_a=True)."
        )


def digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and float32 values, in the order of the names."""
    found = hashlib.sha256()
    for name, A in sorted(named, key=lambda pair: pair[0]):
        found.update(f"{name} {tuple(A.shape)}\n".encode())
        found.update(A.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return found.hexdigest()


def _words(name: str, seed: int, version: int, count: int) -> Tensor:
    """The first `count` outputs of splitmix64, as int64; multiplication wraps around."""
    key = hashlib.sha256(f"{version} {seed} {name}".encode()).digest()[:8]
    z = torch.arange(1, count + 1, dtype=torch.int64).mul_(_signed(0x9E3779B97F4A7C15))
    z += int.from_bytes(key, "little", signed=True)
    z = (z ^ _shifted(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z = (z ^ _shifted(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return z ^ _shifted(z, 31)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
