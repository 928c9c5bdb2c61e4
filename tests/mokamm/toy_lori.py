"""Small LoRI models that tests share: a random Llama of two layers, random B under a random mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mokamm.adapters import Routing, set_routing, wrap
from mokamm.adapters.masks import Mask, keep_top, unpack
from mokamm.adapters.start import factors

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
MODALITIES = Routing(torch.tensor([[0, 1, 1, 0], [1, 2, 0, 0]]), torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]]).bool())
OPTIONS = {"r": 4, "lora_alpha": 8}


def small_llm(dtype: torch.dtype = torch.float64, width: int = 16, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=37, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def random_b(model: Any, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (B.out_features, B.in_features) for name, (_, B) in factors(model).items()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def cut(dense: dict[str, Tensor], sparsity: float = 0.8, a_hash: str | None = None) -> Mask:
    return keep_top({name: tuple(B.shape) for name, B in dense.items()}, dense.__getitem__, sparsity, a_hash)  # type: ignore[misc]


def kept(mask: Mask, name: str) -> Tensor:
    shape = mask.shapes[name]
    return unpack(mask.bits[name], shape[0] * shape[1]).view(shape)


def lori_s(method: str = "lori_s", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Mask]:
    """A LoRI-S with random values under a random mask."""
    model = wrap(small_llm(dtype), method, ["text", "vision", "audio"], {**OPTIONS, **options})
    dense = random_b(model)
    mask = cut(dense)
    model.base_model.set_mask(mask)
    for name, (_, B) in factors(model).items():
        B.start(dense[name].to(dtype) * kept(mask, name))
    return model, mask


def dense_twin(model: Any, method: str) -> Any:
    """The dense method with the same A and B."""
    options = {**OPTIONS, "a_seed": model.peft_config["default"].a_seed}
    twin = wrap(
        small_llm(model.dtype),
        {"lori_s": "lori_d", "lori_moka_s": "lori_moka_d"}[method],
        ["text", "vision", "audio"],
        options,
    )
    for (_, (A, B)), (_, (own_a, own_b)) in zip(factors(twin).items(), factors(model).items(), strict=True):
        assert torch.equal(A.weight, own_a.weight)
        B.weight.data.copy_(own_b.dense())
    return twin


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    set_routing(model, MODALITIES)
    return model(input_ids=ids).logits
