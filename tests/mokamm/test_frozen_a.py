"""The generator of LoRI's A: its numbers, its statistics, its independence of everything else."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mokamm.adapters import AdapterError, wrap
from mokamm.adapters.frozen_a import digest, draw
from mokamm.adapters.start import factors
from tests.mokamm.toy_lori import OPTIONS, small_llm


def splitmix64(name: str, shape: tuple[int, int], seed: int) -> Tensor:
    """The generator once more, in Python's integers."""
    word, bound = 2**64 - 1, 1 / math.sqrt(shape[1])
    key = int.from_bytes(hashlib.sha256(f"1 {seed} {name}".encode()).digest()[:8], "little")
    scale = 1.0
    while bound / scale < 128:
        scale /= 2
    most = int(bound / scale)
    values = []
    for i in range(1, shape[0] * shape[1] + 1):
        z = (key + i * 0x9E3779B97F4A7C15) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        z ^= z >> 31
        values.append(float(Fraction((z >> 32) * (2 * most + 1) // 2**32 - most) * Fraction(scale)))
    return torch.tensor(values).view(shape)


@pytest.mark.parametrize("width", [16, 24, 100, 1000])
def test_the_generator_gives_what_its_description_says(width: int) -> None:
    assert torch.equal(draw("model.layers.0.x", (3, width), 7), splitmix64("model.layers.0.x", (3, width), 7))


def test_version_1_is_fixed_for_ever() -> None:
    """Adapters are published without A: these hashes must never change."""
    named = [(name, draw(name, (8, 96), 5)) for name in ("model.layers.0.q_proj", "model.layers.1.q_proj")]
    assert digest(named) == "e0c5c2c0f4b1978705a357bef9ac28ea7b201d9645bfb019b825d5bef0c33e10"
    laid_out_otherwise = [(name, A.T.contiguous().T) for name, A in named]
    assert not any(A.is_contiguous() for _, A in laid_out_otherwise)
    assert digest(laid_out_otherwise) == digest(named)
    with pytest.raises(AdapterError, match="generator version 2; this mokamm knows version 1"):
        draw("x", (1, 1), 0, version=2)


def test_a_has_the_distribution_of_loras_and_is_exact_in_every_dtype() -> None:
    A = draw("model.layers.3.mlp.up_proj", (32, 4096), 0)
    bound = 1 / 64
    assert A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert A.mean() == pytest.approx(0, abs=4 * bound / A.numel() ** 0.5)
    other = draw("model.layers.4.mlp.up_proj", (32, 4096), 0)
    correlation = torch.corrcoef(torch.stack([A.flatten(), other.flatten()]))[0, 1]
    assert abs(correlation) < 4 / A.numel() ** 0.5
    spectrum = torch.linalg.svdvals(A.double()) / (bound / 3**0.5)  # of independent entries: within sqrt(n) +- sqrt(r)
    assert spectrum.max() < 1.02 * (4096**0.5 + 32**0.5)
    assert spectrum.min() > 0.98 * (4096**0.5 - 32**0.5)
    for width in (16, 4096, 14336):
        A = draw("x", (2, width), 0)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(A.to(dtype).float(), A)


def test_a_asks_no_global_generator_and_is_the_same_for_every_method() -> None:
    found = {}
    for method in ("lori_d", "lori_s", "lori_moka_d", "lori_moka_s"):
        torch.manual_seed(len(found))
        model = wrap(small_llm(), method, ["text"], {**OPTIONS, "a_seed": 3})
        found[method] = digest((name, A.weight) for name, (A, _) in factors(model).items())
    assert len(set(found.values())) == 1
    state = torch.get_rng_state()
    llm = small_llm()
    torch.set_rng_state(state)
    wrap(llm, "lori_s", ["text"], OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    other = wrap(small_llm(), "lori_d", ["text"], {**OPTIONS, "a_seed": 4})
    assert digest((name, A.weight) for name, (A, _) in factors(other).items()) != found["lori_d"]


def test_the_wider_llm_dtype_does_not_change_a() -> None:
    names = [
        wrap(small_llm(dtype), "lori_s", ["text"], OPTIONS).peft_config["default"].a_hash
        for dtype in (torch.bfloat16, torch.float64)
    ]
    assert names[0] == names[1]
