"""Mixtures of experts: fused expert weights under method lora, and a clear refusal wherever they cannot be adapted."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    GPTNeoXConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from mokamm.adapters import AdapterError, RoutedLinear, peft_bridge, set_routing, target_report, wrap
from mokamm.adapters.peft_bridge import transformers_weight_conversion
from mokamm.adapters.targets import linear_names, tuner_layers
from mokamm.convert import main as convert
from mokamm.routing import Routing
from mokamm.weights import load_weights, save_weights
from tests.mokamm.toy_lori import cut, factors, kept, random_b

SHAPE = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
}
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
ATTENTION = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])


def moe(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def adapted(name: str) -> Any:
    return wrap(moe(name), "lora", ["text"], {"r": 2, "lora_alpha": 4, "target_parameters": EXPERTS})


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


class Whole(nn.Module):
    """What of a MultimodalLM `mokamm.weights` asks for."""

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm, self.projectors, self.processor = llm, nn.ModuleDict(), None


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS.values(),
        Glm4MoeConfig(
            **SHAPE, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1
        ),
        GPTNeoXConfig(**{key: value for key, value in SHAPE.items() if "key_value" not in key and key != "head_dim"}),
    ],
    ids=lambda config: config.model_type,
)
def test_a_whole_llm_is_saved_as_it_is_loaded_here_and_by_transformers(config, tmp_path):
    """Fused experts, a router's buffer, and an output layer that the hub knows by another name."""
    llm = AutoModelForCausalLM.from_config(config)
    for number, buffer in enumerate(llm.buffers()):
        if buffer.is_floating_point() and buffer.shape == (4,):
            buffer.fill_(number + 1.0)  # Glm4-MoE's bias of the router
    save_weights(Whole(llm), tmp_path)
    other = Whole(AutoModelForCausalLM.from_config(config))
    load_weights(other, tmp_path)
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in llm.state_dict().items():
        assert torch.equal(other.llm.state_dict()[name], tensor), name
        assert torch.equal(reloaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_is_added_to_every_expert(name):
    """Against the plain LLM with s B_e A_e added to the weight of each expert e, in a loop."""
    model = randomise(adapted(name))
    assert target_report(model) == ATTENTION | dict.fromkeys(EXPERTS, 2)
    plain = moe(name)
    weights = {key.replace("base_model.model.", ""): p.detach() for key, p in model.named_parameters()}
    for i, layer in enumerate(plain.model.layers):
        for own in ATTENTION:
            at = f"model.layers.{i}.self_attn.{own}.lora_{{}}.default.weight"
            getattr(layer.self_attn, own).weight.data += 2 * weights[at.format("B")] @ weights[at.format("A")]
        # PEFT nests the two adapters of one module; each is known by the width that it reads
        nested = [f"model.layers.{i}.mlp.experts{inner}.lora_{{}}.default.weight" for inner in (".base_layer", "")]
        for own in ("down_proj", "gate_up_proj"):
            weight = getattr(layer.mlp.experts, own).data
            (at,) = (name for name in nested if weights[name.format("A")].shape[1] == weight.shape[2])
            a, b = weights[at.format("A")].unflatten(0, (4, 2)), weights[at.format("B")].unflatten(1, (2, 4))
            for e in range(4):
                weight[e] += 2 * b[:, :, e] @ a[e]
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), logits(moe(name)), atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_saves_and_reloads(name, tmp_path):
    from peft import PeftModel

    from mokamm.weights import load_adapter

    gradients = []
    for checkpointing in (False, True):
        model = randomise(adapted(name)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g.abs().sum() > 0 for n, g in gradients[0].items() if "experts" in n)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=0, atol=1e-6)
    before = logits(model.eval())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    after = logits(model)
    assert not torch.allclose(before, after, atol=1e-6)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe(name), tmp_path).eval()
    torch.testing.assert_close(logits(again), after, rtol=0, atol=1e-6)
    own = adapted(name).eval()
    load_adapter(own, tmp_path)
    torch.testing.assert_close(logits(own), after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_leaves_fused_experts_out_and_says_so(name, caplog):
    for method, hint in (
        ("lora", "; adapter.target_parameters=[experts.down_proj, experts.gate_up_proj] adapts them"),
        ("moka", "method moka cannot, with adapter.method=lora adapter.target_parameters"),
    ):
        with caplog.at_level(logging.WARNING, "mokamm"):
            model = wrap(moe(name), method, ["text", "vision"], {"r": 2})
        assert target_report(model) == ATTENTION
        assert "the experts (experts.down_proj, experts.gate_up_proj) are not adapted" in caplog.text
        assert hint in caplog.text
        caplog.clear()
    with caplog.at_level(logging.WARNING, "mokamm"):
        adapted(name)
        wrap(moe(name), "full", ["text"], {"target_parameters": EXPERTS})
    assert not caplog.text


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "moka",
            {"target_parameters": EXPERTS},
            "method 'moka' cannot adapt fused expert weights.*adapter.method=lora",
        ),
        ("multi_lora", {"target_parameters": EXPERTS}, "method 'multi_lora' cannot adapt"),
        (
            "moka",
            {"target_modules": ["q_proj", "gate_up_proj"]},
            r"'gate_up_proj' matches no linear module, but the fused expert weight model.layers.0.mlp.experts.gate_up_proj "
            r"\(method lora adapts it: target_parameters=\[experts.gate_up_proj\]\)",
        ),
        ("lora", {"target_modules": ".*experts.*"}, "but the fused expert weight"),
        (
            "lora",
            {"target_parameters": ["experts.gate_up"]},
            "'experts.gate_up' matches no fused expert weight; did you mean 'experts.gate_up_proj'",
        ),
        ("lora", {"target_parameters": EXPERTS, "lora_dropout": 0.1}, "lora_dropout is 0.1: it must be 0"),
    ],
)
def test_what_is_refused(method, options, message):
    llm = moe("qwen3_moe")
    with pytest.raises(AdapterError, match=message):
        wrap(llm, method, ["text", "vision"], options)
    assert not any("lora_" in n or isinstance(m, RoutedLinear) for n, m in llm.named_modules())


def test_an_llm_without_experts_is_told_so():
    from transformers import LlamaConfig

    llm = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    with pytest.raises(AdapterError, match="matches no fused expert weight: this LLM has none"):
        wrap(llm, "lora", ["text"], {"target_parameters": EXPERTS})


def test_moka_adapts_attention_and_shared_experts(caplog):
    """A shared expert sees all tokens, flattened to (B*T, D): the routing must still be found."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SHAPE, moe_intermediate_size=8, shared_expert_intermediate_size=12, num_experts=4, num_experts_per_tok=2
    )
    llm = AutoModelForCausalLM.from_config(config).eval()
    with caplog.at_level(logging.WARNING, "mokamm"):
        model = wrap(llm, "moka", ["text", "vision"], {"r": 2})
    assert "the experts (experts.down_proj, experts.gate_up_proj) are not adapted" in caplog.text
    assert target_report(model) == ATTENTION | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj", "shared_expert_gate"), 2
    )
    randomise(model)
    ids = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    set_routing(model, Routing(ids, (ids == 0) & (torch.arange(6) > 3)))
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.shared_expert.up_proj")
    seen: dict[str, torch.Tensor] = {}
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], h=output))
    mixed = logits(model)
    hook.remove()
    assert seen["x"].shape == (12, 16)
    whole = layer(seen["x"].view(2, 6, 16)).view(12, -1)  # the same layer on (B,T,D)
    torch.testing.assert_close(seen["h"], whole, rtol=0, atol=1e-6)
    set_routing(model, Routing.text_only())
    assert not torch.allclose(logits(model), mixed, atol=1e-3)


# ---- dense and shared MLPs beside the experts: PEFT takes their names for the experts' (peft_bridge.taken_for_experts) ----

ROUTED = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
MIXED = {
    "qwen3_moe": {**ROUTED, "mlp_only_layers": [0]},
    "qwen3_next": {**ROUTED, "shared_expert_intermediate_size": 8, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
    "ernie4_5_moe": {
        "moe_intermediate_size": 8, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1
    },
    "glm4_moe": DEEPSEEK,
    "deepseek_v3": {**DEEPSEEK, **LATENT},
}  # fmt: skip
LORA = {"r": 2, "lora_alpha": 4}


def mixed(name: str = "glm4_moe", layers: int = 2) -> Any:
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": layers, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape | MIXED[name])).eval()


def linear(llm: nn.Module, *last: str) -> set[str]:
    """The names of an LLM's linear modules without its head, or of those that end so."""
    return {name for name in linear_names(llm) if name != "lm_head" and (not last or name.endswith(last))}


def adapted_modules(model: Any) -> set[str]:
    return set(tuner_layers(model.base_model.model))


def by_peft_alone(folder: Any, llm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Any:
    """As a process loads a folder that has not imported mokamm.adapters."""
    with monkeypatch.context() as patch:
        patch.setattr(transformers_weight_conversion, "convert_peft_config_for_transformers", peft_bridge._rewrite)
        return PeftModel.from_pretrained(llm, folder).eval()


@pytest.mark.parametrize("name", MIXED)
def test_lora_adapts_dense_and_shared_mlps_and_not_the_experts(name, caplog):
    every = linear(mixed(name))
    assert any(name.endswith("gate_proj") for name in every)
    with caplog.at_level(logging.WARNING, "mokamm"):
        model = wrap(mixed(name), "lora", ["text"], LORA)
    assert adapted_modules(model) == every
    assert sum(target_report(model).values()) == len(every)
    assert not model.peft_config["default"].rank_pattern
    assert "PEFT alone would take down_proj, gate_proj, up_proj of this LLM for its experts" in caplog.text


@pytest.mark.parametrize("folded", [False, True])
def test_moka_routes_the_latents_that_deepseek_keeps_in_its_cache(folded):
    """`kv_b_proj` reads them whole, (B,1,S,D), in every step: what generation gives is what whole forwards choose."""
    model = wrap(mixed("deepseek_v3"), "moka", ["text", "audio"], LORA).eval()
    randomise(model)
    ids = torch.tensor([[0, 1, 1, 0, 0], [-1, 1, 0, 1, 0]])
    tokens, keys, mask = torch.tensor([[3, 5, 6, 2, 4], [0, 7, 4, 3, 5]]), torch.zeros(2, 5).bool(), (ids >= 0).long()
    keys[:, 4] = True
    set_routing(model, Routing(ids, keys))
    if folded:
        model.base_model.fold_text()
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(input_ids=tokens, attention_mask=mask, **asked)
        for _ in range(5):
            set_routing(model, Routing(ids, keys))
            position = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=position, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
            ids, keys, mask = (nn.functional.pad(t, (0, 1), value=v) for t, v in ((ids, 0), (keys, False), (mask, 1)))
    assert torch.equal(found, tokens)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=tokens[:, :5], attention_mask=mask[:, :5], **asked), found)


@pytest.mark.parametrize("method", ["dora", "hira", "lori_d", "lori_s", "moka"])
def test_every_method_adapts_the_same_modules(method):
    model = wrap(mixed(), method, ["text"], LORA)
    assert adapted_modules(model) == linear(mixed())


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"lora_dropout": 0.1}, ()),
        ({"target_modules": ["q_proj", "gate_proj"]}, ("q_proj", "gate_proj")),
        ({"target_modules": r".*\.mlp\.down_proj"}, ("mlp.down_proj",)),
    ],
)
def test_options_of_any_kind_reach_the_modules_that_are_named(options, last):
    assert adapted_modules(wrap(mixed(), "lora", ["text"], LORA | options)) == linear(mixed(), *last)


def test_experts_that_are_asked_for_come_beside_the_mlps_with_their_own_rank():
    model = wrap(mixed(), "lora", ["text"], LORA | {"target_parameters": EXPERTS})
    assert linear(mixed()) < adapted_modules(model)
    experts = {name: layer for name, layer in tuner_layers(model).items() if ".experts" in name}
    assert len(experts) == 2
    assert {layer.r["default"] for layer in experts.values()} == {2}


def test_experts_alone_are_adapted_where_the_list_of_modules_is_empty():
    model = randomise(wrap(mixed(), "lora", ["text"], LORA | {"target_modules": [], "target_parameters": EXPERTS}))
    assert adapted_modules(model) == {"model.layers.1.mlp.experts", "model.layers.1.mlp.experts.base_layer"}
    assert target_report(model) == dict.fromkeys(EXPERTS, 1)
    assert not torch.allclose(logits(model), logits(mixed()), atol=1e-3)
    with pytest.raises(AdapterError, match="target_modules is an empty list: name some modules"):
        wrap(mixed(), "lora", ["text"], LORA | {"target_modules": []})


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_folder_loads_and_is_saved_again_with_the_same_modules(method, tmp_path):
    """Of 28 names, which PEFT would shorten to ones that it rewrites."""
    model = randomise(wrap(mixed(layers=4), method, ["text"], LORA))
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(mixed(layers=4), folder).eval()
        assert adapted_modules(again) == linear(mixed(layers=4))
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
        model = again


def test_what_peft_has_to_rewrite_it_still_does():
    """Names of before transformers 5, which are those of no module."""
    before = ["q_proj", *(f"mlp.experts.0.{own}" for own in ("gate_proj", "up_proj", "down_proj"))]
    model = get_peft_model(moe("qwen3_moe"), LoraConfig(r=2, target_modules=before))
    assert sum(".experts" in name for name in adapted_modules(model)) == 4


@pytest.mark.parametrize("method", ["lori_s", "lori_d"])
def test_a_converted_folder_loads_by_peft_alone(method, tmp_path, monkeypatch, capsys):
    mixed().save_pretrained(tmp_path / "base")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = wrap(llm, method, ["text"], LORA | {"lora_dropout": 0.1}).eval()
    if method == "lori_s":
        drawn = random_b(model)
        model.base_model.set_mask(mask := cut(drawn))
        for name, (_, B) in factors(model).items():
            B.start((drawn[name] * kept(mask, name)).float())
    else:
        randomise(model)
    model.save_pretrained(tmp_path / "saved")
    assert convert([str(tmp_path / "saved"), str(tmp_path / "plain"), "--to", "lora"]) == 0
    assert "warning:" not in capsys.readouterr().err
    again = by_peft_alone(tmp_path / "plain", mixed(), monkeypatch)
    assert adapted_modules(again) == linear(mixed())
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(again), logits(mixed()), atol=1e-3)
    assert convert([str(tmp_path / "plain"), str(tmp_path / "once_more"), "--to", "lora"]) == 0


def test_converting_says_what_it_cannot_know_without_the_llm(tmp_path, capsys):
    wrap(mixed(), "lora", ["text"], LORA).save_pretrained(tmp_path / "saved")
    assert convert([str(tmp_path / "saved"), str(tmp_path / "plain"), "--to", "lora"]) == 0
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert not config.get("target_parameters")  # nothing is taken for experts of an LLM that nobody knows
    assert "PEFT alone would take these for the experts" in capsys.readouterr().err
