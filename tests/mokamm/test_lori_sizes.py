"""LoRI's parameters and bytes: counts of the published shapes on the meta device, ratios to LoRA of a small model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval.speed.lori import measure
from mokamm.adapters import wrap
from mokamm.adapters.masks import Mask, pack
from mokamm.adapters.start import factors

SHAPES = {
    "llama 3 8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama 2 7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def first_tenth(shapes: dict[str, tuple[int, int]]) -> Mask:
    """A mask that keeps exactly a tenth of all entries, made without any values."""
    bits, entries, before = {}, 0, 0
    for name, (rows, columns) in shapes.items():
        entries += rows * columns
        where = torch.zeros(rows * columns, dtype=torch.bool)
        where[: round(0.1 * entries) - before] = True
        before = round(0.1 * entries)
        bits[name] = pack(where)
    return Mask(bits, shapes)


@pytest.fixture(scope="module")
def meta_llms() -> dict[str, LlamaForCausalLM]:
    with torch.device("meta"):
        llms = {name: LlamaForCausalLM(LlamaConfig(**shape)) for name, shape in SHAPES.items()}
    return {name: llm.to(torch.bfloat16) for name, llm in llms.items()}


@pytest.mark.parametrize(
    ("method", "shape", "r", "expected"),
    [
        ("lora", "llama 3 8B", 32, 83_886_080),
        ("lori_d", "llama 3 8B", 32, 44_040_192),
        ("lori_s", "llama 3 8B", 32, 4_404_019),
        ("lora", "llama 2 7B", 4, 9_994_240),
        ("moka", "llama 2 7B", 4, 19_103_744),
        ("multi_lora", "llama 2 7B", 4, 29_982_720),
        ("lori_moka_d", "llama 2 7B", 4, 5_439_488),
        ("lori_moka_s", "llama 2 7B", 4, 543_949),
    ],
)
def test_counts_of_large_models_on_the_meta_device(
    meta_llms: dict[str, Any], method: str, shape: str, r: int, expected: int
) -> None:
    """FACTS. Ours draw and allocate nothing there; PEFT's LoRA does both unless it is told."""
    state = torch.get_rng_state()
    with torch.device("meta") if method in ("lora", "lori_d") else nullcontext():
        model: Any = wrap(meta_llms[shape], method, ["text", "vision", "audio"], {"r": r})
    assert torch.equal(torch.get_rng_state(), state)
    if method in ("lori_s", "lori_moka_s"):
        model.base_model.set_mask(first_tenth({name: B.size for name, (_, B) in factors(model).items()}))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.get_nb_trainable_parameters()[0] == expected
    a = sum(A.weight.numel() for A, _ in factors(model).values())
    assert method != "lori_d" or a == 39_845_888
    model.unload()


def test_bytes_against_lora() -> None:
    """At 90 %: at most 6 % of LoRA's trained parameters, gradients and optimizer states, 11 % of its file."""
    sizes = measure(rank=32, sparsity=0.9, layers=2)
    share = {key: size / sizes["lora"][key] for key, size in sizes["lori_s"].items()}
    assert share["trained"] <= 0.06
    assert share["gradient_and_optimizer_bytes"] <= 0.06
    assert share["file_bytes"] <= 0.11
