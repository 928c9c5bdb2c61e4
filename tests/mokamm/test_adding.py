"""Adding a method or a projector is one function or class and one registry line, shown here.

Encoders: tests/encoders/test_registry.py; sources: tests/data/test_readers.py; benchmarks: tests/eval/test_adding.py.
"""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from pydantic import Field
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mokamm.adapters as adapters
from data.schema import UserError
from mokamm.adapters import METHODS, AdapterError, target_report, wrap
from mokamm.projectors import PROJECTORS, Projector, build_projector


def small_llm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rs_lora(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """A method of PEFT's that is not built in: rank-stabilised LoRA, scaled by alpha / sqrt(r) (arXiv 2312.03732)."""
    common = adapters._common(modalities, options)
    return adapters._wrap_by_peft(llm, LoraConfig(task_type="CAUSAL_LM", use_rslora=True, **common))


def test_adding_a_method(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "rs_lora", rs_lora)
    model = wrap(small_llm(), "rs_lora", ["text", "vision"], {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]})
    assert target_report(model) == {"q_proj": 2}
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x = torch.randn(3, 16)
    added = (x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T) * 6 / 2
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added)
    with pytest.raises(AdapterError, match="r must be a whole number of at least 1; found 0"):
        wrap(small_llm(), "rs_lora", ["text"], {"r": 0})
    with pytest.raises(AdapterError, match="'q_prj' matches no linear module; did you mean 'q_proj'"):
        wrap(small_llm(), "rs_lora", ["text"], {"target_modules": ["q_prj"]})
    model.save_pretrained(tmp_path)
    ids = torch.randint(37, (2, 5))
    again = PeftModel.from_pretrained(small_llm(), tmp_path)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)


class LastPatches(Projector):
    """A whole projector: the last `tokens` patches of a segment, each through one matrix."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        boundaries: bool = True,
        *,
        tokens: Annotated[int, Field(ge=1)] = 2,
    ) -> None:
        super().__init__(in_features, out_features, boundaries)
        self.tokens, self.output = tokens, nn.Linear(in_features, out_features)

    def num_tokens(self, patches: int) -> int:
        return min(self.tokens, patches)

    def kept(self, patches: int) -> int:
        return patches * self.in_features

    def forward(self, features_NPC: Tensor, mask_NP: Tensor) -> Tensor:
        counts = mask_NP.sum(1, keepdim=True)
        first = (counts - self.tokens).clamp_min(0)
        at_NK = (first + torch.arange(self.num_tokens(features_NPC.shape[1]))).clamp_max(features_NPC.shape[1] - 1)
        return self.output(self._normed(features_NPC)[torch.arange(len(at_NK))[:, None], at_NK])


def test_adding_a_projector(monkeypatch) -> None:
    monkeypatch.setitem(PROJECTORS, "last", LastPatches)
    projector = build_projector("last", 6, 8, tokens=3)
    features, mask = torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[5], [2]])
    tokens = projector(features, mask)
    assert tokens.shape == (2, 3, 8)
    torch.testing.assert_close(tokens[0], projector.output(projector.norm(features[0, 2:])))
    torch.testing.assert_close(tokens[1, :2], projector.output(projector.norm(features[1, :2])))
    assert projector.start_end().shape == (2, 8)
    with pytest.raises(UserError, match=r"projector 'last' option 'tokens' should be .*; found 0"):
        build_projector("last", 6, 8, tokens=0)
    with pytest.raises(UserError, match="projector 'last' has no option 'token'; did you mean 'tokens'"):
        build_projector("last", 6, 8, token=1)
