"""MokA and LoRI-S with modules that train whole beside them (`modules_to_save`), such as the head of a classifier."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from mokamm.adapters import LoriConfig, MokaConfig
from mokamm.routing import AdapterError, Routing
from tests.mokamm.toy_lori import cut, random_b

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(3, 21).view(2, 9)


def classifier() -> Any:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).double()


def routing() -> Routing:
    modality_ids = torch.zeros(2, 9, dtype=torch.int64)
    modality_ids[:, 1:4] = 1
    return Routing(modality_ids, modality_ids == 0)


def moka(llm: Any, **options: Any) -> Any:
    config = MokaConfig(r=2, modalities=["text", "vision"], target_modules="all-linear", **options)
    return get_peft_model(llm, config, autocast_adapter_dtype=False)


def scores(model: Any) -> torch.Tensor:
    if hasattr(model.base_model, "set_routing"):
        model.base_model.set_routing(routing())
    return model(input_ids=IDS).logits


def train(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores(model), torch.tensor([0, 2])).backward()
        optimizer.step()


def test_the_head_of_a_classifier_trains_and_is_saved(tmp_path: Path) -> None:
    before = classifier()
    plain = before(input_ids=IDS).logits
    model = moka(before, task_type="SEQ_CLS")
    assert not any("score" in target for target in model.base_model.target_report["default"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.score.modules_to_save.default.weight" in trained
    assert all("moka_" in name or "modules_to_save" in name for name in trained)
    train(model)
    expected = scores(model)
    assert (expected - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(scores(again), expected, rtol=0, atol=1e-12)
    with again.disable_adapter():
        torch.testing.assert_close(again(input_ids=IDS).logits, plain, rtol=0, atol=1e-12)


def test_embeddings_and_head_of_an_llm_train_beside_moka(tmp_path: Path) -> None:
    def llm() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SIZES)).double()

    model = moka(llm(), task_type="CAUSAL_LM", modules_to_save=["embed_tokens", "lm_head"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    scores(model).logsumexp(-1).sum().backward()
    optimizer.step()
    expected = scores(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llm(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(scores(again), expected, rtol=0, atol=1e-12)
    assert not torch.equal(again.get_input_embeddings().weight, llm().get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("kind", "task", "head"),
    [
        (LlamaForTokenClassification, "TOKEN_CLS", "score"),
        (LlamaForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_heads_that_peft_names_after_injection(tmp_path: Path, kind: Any, task: str, head: str) -> None:
    def first(model: Any) -> torch.Tensor:
        model.eval().base_model.set_routing(routing())
        return model(input_ids=IDS)[0]

    def tagger() -> Any:
        torch.manual_seed(0)
        return kind(LlamaConfig(**SIZES)).double()

    model = moka(tagger(), task_type=task)
    assert head not in model.base_model.target_report["default"]
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    expected = first(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tagger(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(first(again), expected, rtol=0, atol=1e-12)
    own, plain = again.get_submodule(f"base_model.model.{head}"), tagger().get_submodule(head)
    assert not torch.equal(own.modules_to_save["default"].weight, plain.weight)


def test_a_second_adapter_without_modules_of_its_own(tmp_path: Path) -> None:
    """It reads the original ones, and adapts nothing inside of the first one's."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**SIZES)).double()
    fresh = copy.deepcopy(llm)
    model = moka(llm, task_type="CAUSAL_LM", modules_to_save=["lm_head", "down_proj"])
    config = MokaConfig(r=2, modalities=["text", "vision"], task_type="CAUSAL_LM")
    model.add_adapter("second", config, autocast_adapter_dtype=False)
    model.set_adapter("second")
    names = model.base_model.target_report["second"]
    assert set(names) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    expected = scores(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh, tmp_path / "second", autocast_adapter_dtype=False)
    torch.testing.assert_close(scores(again), expected, rtol=0, atol=1e-12)


def test_modules_that_cannot_train_whole_are_told() -> None:
    for entry, told in (("scoer", "'scoer' matches no module; did you mean 'score'"), ("_proj", "matches no linear")):
        with pytest.raises(AdapterError, match=told):
            moka(classifier(), task_type="SEQ_CLS", modules_to_save=[entry])
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp lies in another of these modules"):
        moka(classifier(), modules_to_save=["layers.1", "mlp"])
    with pytest.raises(AdapterError, match="must be a list of names; found 'score'"):
        MokaConfig(modules_to_save="score")  # type: ignore[arg-type]
    model = moka(classifier())
    for entry in ("o_proj", "layers.1"):
        with pytest.raises(AdapterError, match="another adapter of this model adapts it"):
            model.add_adapter("second", MokaConfig(r=2, modalities=["text", "vision"], modules_to_save=[entry]))
    assert list(model.peft_config) == ["default"]
    assert torch.isfinite(scores(model)).all()


def test_a_refused_merge_changes_nothing() -> None:
    plain = classifier()(input_ids=IDS).logits
    model = moka(classifier(), task_type="SEQ_CLS", modules_to_save=["embed_tokens"])
    train(model)
    keys = set(model.state_dict())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match="cannot be merged"):
            merge()
    assert set(model.state_dict()) == keys
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain, rtol=0, atol=1e-12)


def test_a_module_that_trains_whole_is_no_target() -> None:
    model = moka(classifier(), modules_to_save=["down_proj", "layers.1.self_attn"])
    names = model.base_model.targeted_module_names
    assert not [name for name in names if name.endswith("down_proj") or "layers.1.self_attn" in name]
    assert any("layers.0.self_attn.q_proj" in name for name in names)
    with pytest.raises(AdapterError, match="'q_proj' matches no linear module"):
        get_peft_model(classifier(), MokaConfig(target_modules=["q_proj"], modules_to_save=["q_proj"]))


def test_lori_s_keeps_a_classifiers_head_too(tmp_path: Path) -> None:
    def wrapped() -> Any:
        return get_peft_model(classifier(), LoriConfig(r=4, task_type="SEQ_CLS"), autocast_adapter_dtype=False)

    model = wrapped()
    model.base_model.set_mask(cut(random_b(model), 0.5))
    train(model)
    expected = scores(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(scores(again), expected, rtol=0, atol=1e-12)
