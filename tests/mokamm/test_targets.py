"""Names of a config to modules, on small modules written out here: each expected list is read off them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mokamm.adapters.targets import (
    AdapterError,
    ends_in,
    first_match,
    fused_experts,
    linear_names,
    match_targets,
    name_whole_modules,
    unfit_modules,
)


class Grouped(nn.Linear):
    """As transformers has such: a linear by class, whose result is a tensor of another shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(-1)


Grouped.__module__ = "transformers.models.some.modeling_some"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.xq_proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4), Grouped(4, 4)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.zeros(2, 4, 4))
        self.experts.scale = nn.Parameter(torch.zeros(2, 4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.q_proj.weight) + self.xq_proj.weight


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lm_head = Block(), nn.Linear(4, 9)
        self.config = SimpleNamespace(model_type="none", tie_word_embeddings=False)


def config(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, **options)


def matched(**options: Any) -> dict[str, list[str]]:
    return match_targets(Model(), config(**options))


def test_a_name_is_the_end_of_a_path_from_a_dot_on() -> None:
    assert ends_in("a.q_proj", "q_proj")
    assert ends_in("q_proj", "q_proj")
    assert not ends_in("a.xq_proj", "q_proj")
    assert first_match(["q_proj"], "a.xq_proj") is None
    assert first_match(["x", "q_proj"], "a.q_proj") == "q_proj"
    assert matched(target_modules=["q_proj"]) == {"q_proj": ["a.q_proj"]}
    assert matched(target_modules=r"a\.q.*") == {r"a\.q.*": ["a.q_proj"]}
    with pytest.raises(AdapterError, match=r"'a\\.q' matches no linear module; .*known: lm_head, q_proj, xq_proj$"):
        matched(target_modules=r"a\.q")


@pytest.mark.parametrize("every", ["all-linear", "ALL-LINEAR", None])
def test_all_linear_leaves_out_the_head_and_what_cannot_be_adapted(every: str | None) -> None:
    both = {"q_proj": ["a.q_proj"], "xq_proj": ["a.xq_proj"]}
    assert matched(target_modules=every) == both
    named, model = Model(), Model()
    model.top, model.lm_head = model.lm_head, nn.Identity()  # a head by another name
    model.get_output_embeddings = lambda: model.top
    assert match_targets(model, config(target_modules=every)) == both
    assert unfit_modules(named) == {"a.out": "a Grouped, which does not give one row of outputs for one of inputs"}
    with pytest.raises(AdapterError, match=r"'out' matches a\.out, a Grouped, .*exclude_modules='\.\*\\\.out'"):
        matched(target_modules=["out"])


@pytest.mark.parametrize(
    ("excluded", "left"),
    [(["q_proj"], ["xq_proj"]), (["a.q_proj"], ["xq_proj"]), (["proj"], ["q_proj", "xq_proj"]), ("a.x.*", ["q_proj"]),
     (["a.*"], ["q_proj", "xq_proj"])],
)  # fmt: skip
def test_excluded_names_are_whole_and_no_patterns(excluded: Any, left: list[str]) -> None:
    assert sorted(matched(target_modules="all-linear", exclude_modules=excluded)) == left


def test_an_excluded_name_that_matches_nothing_is_told_in_training_alone(caplog) -> None:
    matched(exclude_modules=["proj"])
    assert "exclude_modules: 'proj' matches no linear module" in caplog.text
    caplog.clear()
    matched(exclude_modules=["proj"], inference_mode=True)
    assert not caplog.text


def test_linear_modules_keep_their_names_under_adapters_and_none_are_found_inside() -> None:
    assert linear_names(nn.Linear(2, 2)) == []
    names = ["a.q_proj", "a.xq_proj", "a.out", "lm_head"]
    assert linear_names(Model()) == names
    wrapped = PeftModel(Model(), config(target_modules=["q_proj"], modules_to_save=["lm_head"])).base_model.model
    assert linear_names(wrapped) == names[:3]  # the head trains whole, in a copy


class QuantLinear(nn.Module):
    in_features = out_features = 4


class SomeLinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.norm, self.packed = nn.Linear(4, 4), SomeLinearNorm(4), QuantLinear()


class SomeLinearNorm(nn.LayerNorm):
    pass


def test_a_class_is_not_linear_by_a_word_in_its_name() -> None:
    """As KimiLinear's attention, norms and experts, and OlmoHybrid's layers are called."""
    model = Model()
    model.a.mixer = SomeLinearAttention()
    assert linear_names(model) == ["a.q_proj", "a.xq_proj", "a.out", "a.mixer.q_proj", "a.mixer.packed", "lm_head"]


def test_fused_experts_are_weights_of_three_dimensions_by_one_name_wrapped_or_not() -> None:
    model = Model()
    assert fused_experts(model) == ["a.experts.up"]
    model.a.experts.forward = lambda x: x
    wrapped = get_peft_model(model, config(target_modules=[], target_parameters=["experts.up"]))
    assert fused_experts(wrapped.base_model.model) == ["a.experts.up"]


def test_heads_of_a_task_train_whole_whether_they_are_named_or_not() -> None:
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    for given in (None, ["score"], ["classifier", "score"]):
        found = config(task_type="SEQ_CLS", modules_to_save=given)
        name_whole_modules(llm, found)
        assert found.modules_to_save == ["classifier", "score"]
    end = config(modules_to_save=["0.mlp"])  # as PEFT takes it, by the end of a path
    name_whole_modules(llm, end)
    assert end.modules_to_save == ["0.mlp"]
    with pytest.raises(AdapterError, match="modules_to_save: 'mlq' matches no module; did you mean 'mlp'"):
        name_whole_modules(llm, config(modules_to_save=["mlq"]))
