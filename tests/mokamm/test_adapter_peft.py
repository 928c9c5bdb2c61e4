"""The routed adapter as a PEFT method: names, saving, several adapters, folding, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
)

from mokamm.adapters import (
    METHODS,
    AdapterError,
    LoriConfig,
    MokaConfig,
    MokaModel,
    RoutedLinear,
    set_routing,
    target_report,
    wrap,
)
from mokamm.adapters.targets import _weights_read, unfit_modules
from mokamm.names import ROUTED
from mokamm.routing import Routing

IDS = torch.tensor([[0, 1, 1, 2, 0, 0, 0, -1], [1, 1, 0, 0, 2, 2, 0, 0]])
KEYS = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 1, 0]]).bool()
SEVEN = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2, "gate_proj": 2, "up_proj": 2, "down_proj": 2}


def small_llm(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "moka_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return model.eval()


def logits_of(model: nn.Module, routing: Routing | None = None) -> Tensor:
    set_routing(model, routing or Routing(IDS, KEYS))
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(inputs_embeds=x.to(model.dtype), attention_mask=(IDS >= 0).long()).logits


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_names_shapes_and_initialisation() -> None:
    for shared, columns in ((True, 5), (False, 15)):
        model = get_peft_model(small_llm(), MokaConfig(r=5, target_modules=["up_proj"], shared_b=shared))
        assert model.peft_type == PeftType("MOKA") == "MOKA"
        shapes = {n.split("layers.0.")[1]: tuple(p.shape) for n, p in model.named_parameters() if "0.mlp.up_proj" in n}
        assert shapes == {
            "mlp.up_proj.base_layer.weight": (24, 16),
            "mlp.up_proj.moka_A.default.weight": (15, 16),
            "mlp.up_proj.moka_B.default.weight": (24, columns),
        }
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        A = layer.moka_A["default"].weight
        assert not layer.moka_B["default"].weight.any()
        assert 0.2 < A.abs().max() <= 1 / 16**0.5  # Kaiming-uniform with a = sqrt 5
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n in parameters(model) if "moka" in n
        }


def test_counts_for_llama_2_7b() -> None:
    """FACTS: seven targets, rank 4; the model stands on the meta device."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    expected = {("text", "v", "a"): 19_103_744, ("text", "v"): 14_548_992, ("text",): 9_994_240}
    with torch.device("meta"):
        llm = LlamaForCausalLM(config)
        for modalities, count in expected.items():
            model = get_peft_model(llm, MokaConfig(r=4, modalities=list(modalities)))
            assert model.get_nb_trainable_parameters()[0] == count
            assert target_report(model) == dict.fromkeys(SEVEN, 32)
            llm = model.unload()
        model = get_peft_model(llm, MokaConfig(r=4, shared_b=False))
        assert model.get_nb_trainable_parameters()[0] == 29_982_720


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("name", ["default", "vision"])
def test_save_and_reload_on_the_plain_llm(tmp_path: Path, task_type: str | None, name: str) -> None:
    config = MokaConfig(
        r=3, lora_alpha=5, scale_logits=False, attention_weight=0.5, attention_weight_pattern={"q_proj": 0.25},
        shared_b=False, modalities=["text", "vision", "audio"], task_type=task_type,
    )  # fmt: skip
    model = randomise(get_peft_model(small_llm(), config, adapter_name=name))
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == 28
    assert "base_model.model.model.layers.0.self_attn.q_proj.moka_A.weight" in saved
    assert all("moka_" in key and name not in key for key in saved)
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert stored["peft_type"] == "MOKA"

    again = PeftModel.from_pretrained(small_llm(), folder, adapter_name=name).eval()
    torch.testing.assert_close(logits_of(again), expected, rtol=0, atol=1e-12)
    for key, value in model.peft_config[name].to_dict().items():
        found = getattr(again.peft_config[name], key)
        if key == "target_modules":
            assert set(found) == set(value)
        elif key not in ("inference_mode", "auto_mapping"):
            assert found == value, key
    assert isinstance(PeftConfig.from_pretrained(folder), MokaConfig)
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(small_llm(), folder, adapter_name=name, is_trainable=True)
    assert sum(p.requires_grad for p in trainable.parameters()) == 28

    # and as a text model that knows of no media
    set_routing(again, Routing.text_only())
    ids = torch.tensor([[3, 4, 5]])
    text = again.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 7)


def test_a_config_serves_several_models(tmp_path: Path) -> None:
    """It stays as it was written: names and a hash of one LLM are no settings of the next."""
    for config in (
        MokaConfig(r=2, target_modules=["q_proj"], frozen_a=True),
        LoriConfig(r=2, target_modules="all-linear"),
    ):
        targets = copy.copy(config.target_modules)
        first = get_peft_model(small_llm(), config)
        assert (config.target_modules, config.a_hash) == (targets, None)
        own = first.peft_config["default"]
        assert own is first.base_model.peft_config["default"]
        assert own.a_hash
        assert all(name.startswith("model.layers.") for name in own.target_modules)
        first.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "adapter_config.json").read_text())
        assert set(stored["target_modules"]) == set(own.target_modules)
        assert stored["a_hash"] == own.a_hash

        config.a_seed = 5
        torch.manual_seed(0)
        deeper = LlamaForCausalLM(LlamaConfig(**{**small_llm().config.to_dict(), "num_hidden_layers": 3}))
        second = get_peft_model(deeper, config)
        assert sum(target_report(second).values()) == 3 * sum(target_report(first).values()) // 2
        second.add_adapter("more", config)
        assert len({id(c) for c in (config, *second.peft_config.values())}) == 3


def test_pickle_and_deepcopy_keep_one_context() -> None:
    model = randomise(get_peft_model(small_llm(), MokaConfig(r=2)))
    expected = logits_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.base_model.context is not model.base_model.context
        assert {id(layer.context) for layer in twin.base_model.routed_layers()} == {id(twin.base_model.context)}
        assert torch.equal(logits_of(twin), expected)


def test_disable_adapter_and_unload_give_the_base_back() -> None:
    base = logits_of(small_llm())
    model = randomise(get_peft_model(small_llm(), MokaConfig(r=3)))
    adapted = logits_of(model)
    assert not torch.allclose(adapted, base)
    model.base_model.fold_text()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), base)
        set_routing(model, None)  # the base alone asks for no routing
        model(inputs_embeds=torch.zeros(1, 4, 16, dtype=torch.float64))
    assert torch.equal(logits_of(model), adapted)
    assert torch.equal(logits_of(model.unload()), base)


def test_unloading_or_loading_weights_takes_the_folded_text_path_out() -> None:
    base, model = small_llm(), randomise(get_peft_model(small_llm(), MokaConfig(r=3)))
    other = {name: tensor + 0.1 for name, tensor in get_peft_model_state_dict(model).items()}
    model.base_model.fold_text()
    set_peft_model_state_dict(model, other)
    assert not model.base_model.folded
    loaded = logits_of(model)
    model.base_model.fold_text()
    torch.testing.assert_close(logits_of(model), loaded, rtol=0, atol=1e-10)
    plain = model.unload()
    for (name, own), (_, expected) in zip(plain.named_parameters(), base.named_parameters(), strict=True):
        assert torch.equal(own, expected), name


@pytest.mark.parametrize("part", ["", "base_model.model", "base_model.model.model.layers.1.mlp.up_proj"])
def test_the_state_dict_of_a_folded_model_holds_the_weights_themselves(part: str) -> None:
    model = randomise(get_peft_model(small_llm(), MokaConfig(r=3)))
    expected, whole = logits_of(model), model.get_submodule(part)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for _ in range(2):
        model.base_model.fold_text()
        assert model.base_model.folded
        state = copy.deepcopy(whole.state_dict())
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        model.base_model.fold_text()
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-10)
        whole.load_state_dict(state)
        model.base_model.unfold_text()
        assert torch.equal(logits_of(model), expected)


def test_several_adapters() -> None:
    model = randomise(get_peft_model(small_llm(), MokaConfig(r=3)))
    first = logits_of(model)
    model.add_adapter("other", MokaConfig(r=5, target_modules=["q_proj", "up_proj"], scale_logits=False))
    randomise(model, seed=7)
    randomised = logits_of(model)
    assert not torch.equal(randomised, first)
    model.set_adapter("other")
    other = logits_of(model)
    trained = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other"}
    model.base_model.fold_text()
    torch.testing.assert_close(logits_of(model), other, rtol=0, atol=1e-10)
    model.set_adapter("default")  # takes the folded one out first
    assert not model.base_model.folded
    assert torch.equal(logits_of(model), randomised)
    model.base_model.set_adapter(["default", "other"])
    both = logits_of(model)
    assert not torch.equal(both, randomised)
    model.base_model.fold_text()
    torch.testing.assert_close(logits_of(model), both, rtol=0, atol=1e-10)
    model.delete_adapter("other")
    assert torch.equal(logits_of(model), randomised)


def test_a_routing_must_suit_every_active_adapter() -> None:
    model = get_peft_model(small_llm(), MokaConfig(r=3))
    model.add_adapter("fewer", MokaConfig(r=3, modalities=["text", "vision"]))
    set_routing(model, Routing(IDS, KEYS))
    assert IDS.max() == 2
    for active in (["default", "fewer"], ["fewer", "default"]):
        model.base_model.set_adapter(active)
        with pytest.raises(AdapterError, match="modalit"):
            set_routing(model, Routing(IDS, KEYS))
        set_routing(model, Routing(IDS.clamp(max=1), KEYS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_folding_is_taken_out_bit_by_bit(dtype: torch.dtype) -> None:
    model = randomise(get_peft_model(small_llm(dtype), MokaConfig(r=3)))
    for layer in model.base_model.routed_layers():
        layer.base_layer.weight.data[0, :3] = torch.tensor([0.0, -0.0, 1e-7])
    before, x = parameters(model), torch.randn(2, 1, 16).to(dtype)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with torch.no_grad():
        text = layer(x)
        for _ in range(2):
            model.base_model.fold_text()
            model.base_model.fold_text()  # a second time changes nothing
            assert model.base_model.folded
            assert not torch.equal(
                layer.base_layer.weight, before["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"]
            )
            torch.testing.assert_close(layer(x), text, rtol=2e-2, atol=2e-2)
            for parameter in layer.moka_A.parameters():
                parameter.add_(1.0)  # whoever trains on while folded loses nothing of W
            model.base_model.unfold_text()
            for parameter in layer.moka_A.parameters():
                parameter.sub_(1.0)
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            assert torch.equal(parameter, before[name]), name
            assert torch.equal(parameter.signbit(), before[name].signbit()), name


def test_folding_transposed_weights() -> None:
    torch.manual_seed(0)
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=32)).double().eval()
    model = randomise(get_peft_model(llm, MokaConfig(r=3)))
    assert target_report(model) == {"c_attn": 1, "c_proj": 2, "c_fc": 1}
    expected = logits_of(model)
    model.base_model.fold_text()
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-10)


def test_folding_is_refused_whole() -> None:
    model = get_peft_model(small_llm(), MokaConfig(r=3))
    before = parameters(model)
    packed = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj").base_layer
    packed.weight = nn.Parameter(torch.zeros(192, 1, dtype=torch.uint8), requires_grad=False)  # as 4-bit weights look
    with pytest.raises(AdapterError, match="quantized or sharded"):
        model.base_model.fold_text()
    assert not model.base_model.folded
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    assert torch.equal(model.get_parameter(name), before[name])

    away = get_peft_model(small_llm(), MokaConfig(r=3))
    before = parameters(away)
    cpu_offload(away.get_submodule("base_model.model.model.layers.1"), execution_device=torch.device("cpu"))
    with pytest.raises(AdapterError, match="a Linear whose weight is offloaded"):
        away.base_model.fold_text()
    assert not away.base_model.folded
    assert torch.equal(away.get_parameter(name), before[name])

    tied = get_peft_model(small_llm(), MokaConfig(r=3, target_modules=["q_proj", "o_proj"]))
    attention = tied.base_model.model.model.layers[0].self_attn
    attention.o_proj.base_layer.weight = attention.q_proj.base_layer.weight
    with pytest.raises(AdapterError, match="shares"):
        tied.base_model.fold_text()


def test_training_while_folded_is_refused() -> None:
    model = get_peft_model(small_llm(), MokaConfig(r=3)).train()
    model.base_model.fold_text()
    set_routing(model, Routing.text_only())
    with pytest.raises(AdapterError, match=r"unfold_text\(\) first"):
        model(input_ids=torch.tensor([[3, 4]]))
    with torch.no_grad():  # what records no gradient, an evaluation in between, may go on
        model(input_ids=torch.tensor([[3, 4]]))
    set_routing(model, Routing(IDS, KEYS))
    with pytest.raises(AdapterError, match=r"unfold_text\(\) first"):
        model(input_ids=torch.tensor([[3]]))  # a step after the prompt
    model.eval()  # gradients would miss the text path
    set_routing(model, Routing(IDS, KEYS))
    with pytest.raises(AdapterError, match=r"inputs alone: model\.requires_grad_\(False\)"):
        model(inputs_embeds=torch.zeros(2, 1, 16).double().requires_grad_()).logits.sum().backward()  # of a step, too
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    expected = model(inputs_embeds=x).logits
    with pytest.raises(AdapterError, match=r"inputs alone: model\.requires_grad_\(False\)"):
        expected.sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_routing(model.requires_grad_(True), Routing.text_only())
    text = model(inputs_embeds=x.clone().requires_grad_()).logits.sum()
    with pytest.raises(AdapterError, match=r"unfold_text\(\) first"):
        text.backward()
    set_routing(model.requires_grad_(False), Routing(IDS, KEYS))
    model(inputs_embeds=x.requires_grad_()).logits.sum().backward()
    folded, x.grad = x.grad, None
    model.base_model.unfold_text()
    model(inputs_embeds=x).logits.sum().backward()
    torch.testing.assert_close(folded, x.grad)


def test_where_b_alone_trains_a_folded_layer_has_no_derivative_either() -> None:
    model = get_peft_model(small_llm(), MokaConfig(r=3, frozen_a=True)).eval()
    model.base_model.fold_text()
    set_routing(model, Routing.text_only())
    out = model(inputs_embeds=torch.randn(2, 8, 16, dtype=torch.float64).requires_grad_()).logits
    with pytest.raises(AdapterError, match=r"unfold_text\(\) first"):
        out.sum().backward()


def test_another_dtype_takes_the_folded_text_path_out_first() -> None:
    model = randomise(get_peft_model(small_llm(torch.float32), MokaConfig(r=3)))
    model.base_model.fold_text()
    model.to(torch.bfloat16)
    assert not model.base_model.folded
    expected = small_llm(torch.float32).to(torch.bfloat16)
    with model.disable_adapter():
        ids = torch.tensor([[3, 4]])
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_what_peft_does_for_lora_alone_is_refused() -> None:
    model = get_peft_model(small_llm(), MokaConfig(r=3))
    set_routing(model, Routing.text_only())
    with pytest.raises(AdapterError, match=r"A MOKA adapter cannot be chosen row by row \(adapter_names\)"):
        model(input_ids=torch.tensor([[3, 4]]), adapter_names=["default"])
    with pytest.raises(AdapterError, match="MOKA adapters cannot be combined by weights"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize("method", ["moka", "lora", "lori_s"])
def test_an_excluded_name_that_matches_nothing(method, caplog) -> None:
    for entry in (["vproj"], "vproj"):
        caplog.clear()
        assert target_report(wrap(small_llm(), method, ["vision"], {"exclude_modules": entry})) == SEVEN
        assert "exclude_modules: 'vproj' matches no linear module; did you mean 'v_proj'" in caplog.text
    model = wrap(small_llm(), method, ["vision"], {"exclude_modules": ["v_proj", "o_proj"]})
    assert set(target_report(model)) == set(SEVEN) - {"v_proj", "o_proj"}


def test_merging_is_refused_with_the_reason() -> None:
    model = get_peft_model(small_llm(), MokaConfig(r=3))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match="cannot be merged: each modality"):
            merge()


def test_frozen_a_stays_frozen() -> None:
    model = get_peft_model(small_llm(), MokaConfig(r=3, frozen_a=True))
    model.add_adapter("other", MokaConfig(r=3))

    def trainable() -> set[tuple[str, str]]:
        return {tuple(n.split(".")[-3:-1]) for n, p in model.named_parameters() if p.requires_grad}

    assert trainable() == {("moka_B", "default")}
    model.set_adapter("other")
    assert trainable() == {("moka_A", "other"), ("moka_B", "other")}
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    assert trainable() == {("moka_B", "default")}


def test_all_linear_leaves_the_head_out_and_is_counted() -> None:
    model = get_peft_model(small_llm(), MokaConfig(r=2))
    assert target_report(model) == SEVEN
    assert not isinstance(model.base_model.model.lm_head, RoutedLinear)
    named = get_peft_model(small_llm(), MokaConfig(r=2, target_modules=["self_attn.q_proj", "up_proj"]))
    assert target_report(named) == {"self_attn.q_proj": 2, "up_proj": 2}
    less = get_peft_model(small_llm(), MokaConfig(r=2, exclude_modules=["q_proj"]))
    assert target_report(less) == {name: n for name, n in SEVEN.items() if name != "q_proj"}
    regex = get_peft_model(small_llm(), MokaConfig(r=2, target_modules=r".*layers\.0\.mlp\..*"))
    assert target_report(regex) == {r".*layers\.0\.mlp\..*": 3}


SMALL = {
    "vocab_size": 37, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "pad_token_id": 0,
}  # fmt: skip
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
ODD = {  # LLM: (its config, a linear module that cannot be adapted, why, others that can)
    "phimoe": ({"num_local_experts": 4}, "router", "a PhimoeTopKRouter, which does not give one row", {"q_proj"}),
    "falcon_h1": (HYBRID, "out_proj", "whose weight FalconH1Mixer reads past", {"q_proj", "in_proj"}),
    "mamba": ({"state_size": 4}, "out_proj", "whose weight MambaMixer reads past", {"in_proj"}),
}


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "lori_s", "moka"])
@pytest.mark.parametrize("llm", ODD)
def test_what_cannot_be_adapted_is_left_out_by_all_linear_and_refused_by_name(llm: str, method: str) -> None:
    options, odd, why, others = ODD[llm]

    def build() -> nn.Module:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(llm, **SMALL | options)).eval()

    model = wrap(build(), method, ["text", "vision"], {"r": 2})
    assert odd not in target_report(model)
    assert others <= set(target_report(model))
    set_routing(model, Routing.text_only())
    embeddings = torch.randn(2, 6, 32)
    assert model(inputs_embeds=embeddings).logits.shape == (2, 6, 37)
    for targets in ([odd], rf".*{odd}"):
        with pytest.raises(AdapterError, match=rf"matches \S+\.{odd}, {why}.*exclude_modules='\.\*\\\.{odd}'"):
            wrap(build(), method, ["text", "vision"], {"r": 2, "target_modules": targets})


@pytest.mark.parametrize("llm", ["mamba", "falcon_mamba", "jamba"])
def test_a_projection_whose_weight_a_mixer_reads_itself_is_no_target(llm: str) -> None:
    def build() -> nn.Module:
        options = (
            {"state_size": 4} if llm != "jamba" else {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        )
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(llm, **SMALL | options)).eval()

    torch.manual_seed(0)
    pefts = get_peft_model(build(), LoraConfig(target_modules=["dt_proj"], init_lora_weights=False))
    ids = torch.arange(3, 12)[None]
    adapted = pefts(input_ids=ids).logits
    with pefts.disable_adapter():
        assert torch.equal(pefts(input_ids=ids).logits, adapted)  # the reason: PEFT's own adapter there does nothing
    assert "dt_proj" not in target_report(wrap(build(), "lora", ["text"], {"r": 2}))
    with pytest.raises(AdapterError, match=r"matches \S+\.dt_proj, whose weight \w+Mixer reads past any"):
        wrap(build(), "moka", ["text", "vision"], {"r": 2, "target_modules": ["dt_proj"]})


# LLM: the linear modules whose weight its code multiplies by itself, on a CPU or in the kernels that a GPU takes
READ_PAST = {
    "bamba": {"out_proj"}, "granitemoehybrid": {"out_proj"}, "zamba2": {"out_proj"}, "nemotron_h": {"out_proj"},
    "mamba": {"x_proj", "dt_proj", "out_proj"}, "mamba2": {"out_proj"}, "jamba": {"dt_proj"},
    "longcat_flash": {"classifier"}, "gemma3n_text": {"correction_coefs"},
    "bloom": set(), "gpt2": set(), "qwen3_next": set(), "llama": set(),
}  # fmt: skip


@pytest.mark.parametrize("name", READ_PAST)
def test_which_weights_are_read_past_an_adapter_is_read_in_the_llm_s_own_code(name: str) -> None:
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(name))
    past = {module.rpartition(".")[2] for module, why in unfit_modules(llm).items() if "reads past" in why}
    assert past == READ_PAST[name]
    with pytest.MonkeyPatch.context() as patch:  # code whose source is gone: nothing is known, nothing refused
        patch.setattr(inspect, "getsource", Mock(side_effect=OSError("no source")))
        _weights_read.cache_clear()
        assert not [why for why in unfit_modules(llm).values() if "reads past" in why]
    _weights_read.cache_clear()


def test_a_weight_whose_dtype_or_a_slice_alone_is_asked_for_is_adapted() -> None:
    t5 = T5Model(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    assert not unfit_modules(t5)


class Talked(nn.Module):
    """Code that speaks of a weight, asks for its size, and reads another one."""

    def forward(self, x: Tensor) -> Tensor:  # not x @ self.spoken.weight.T
        wide = x.expand(self.sized.weight.size(0), -1) if self.sized.weight.requires_grad else x
        return wide @ self.read.weight.T


def test_a_weight_that_a_comment_names_or_whose_size_is_asked_for_is_adapted() -> None:
    assert _weights_read(Talked) == {"read"}


def test_a_linear_class_of_an_llm_s_own_is_adapted() -> None:
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **SMALL))
    assert type(llm.transformer.h[0].mlp.dense_h_to_4h).forward is not nn.Linear.forward
    four = {"query_key_value": 2, "dense": 2, "dense_h_to_4h": 2, "dense_4h_to_h": 2}
    assert target_report(wrap(llm, "lora", ["text"], {"r": 2})) == four


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])
        self.gate = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"modalities": []}, "distinct names"),
        ({"modalities": ["vision", "text"]}, "'text' first"),
        ({"modalities": ["text", "audio", "audio"]}, "distinct names"),
        ({"target_modules": ["q_prj", "up_proj"]}, "'q_prj' matches no linear module; did you mean 'q_proj'"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear module"),
        ({"target_modules": "nothing.*"}, "matches no linear module"),
        ({"target_modules": []}, "target_modules is an empty list"),
        ({"attention_weight_pattern": {"q_prj": 1.0}}, "'q_prj' matches none of the 14"),
    ],
)
def test_what_a_config_may_not_say(options: dict, message: str) -> None:
    llm = small_llm()
    with pytest.raises(AdapterError, match=message):
        get_peft_model(llm, MokaConfig(**options))
    assert not any(isinstance(module, RoutedLinear) for module in llm.modules())


@pytest.mark.parametrize("name", ["mlp", "q_proj", "model", "a.b", "", "base_model", "base_layer", "weight", "bias"])
def test_adapter_names_that_would_garble_keys(name: str) -> None:
    with pytest.raises(AdapterError, match="cannot be named"):
        get_peft_model(small_llm(), MokaConfig(r=2), adapter_name=name)
    model = get_peft_model(small_llm(), MokaConfig(r=2))
    with pytest.raises(AdapterError, match="cannot be named"):
        model.add_adapter(name, MokaConfig(r=2))
    assert list(model.peft_config) == ["default"]


def test_experts_are_refused_unless_left_out() -> None:
    with pytest.raises(AdapterError, match="only some of a batch's tokens"):
        get_peft_model(Expert(), MokaConfig(r=2))
    model = get_peft_model(Expert(), MokaConfig(r=2, exclude_modules=r".*experts\..*"))
    assert target_report(model) == {"gate": 1}


def test_modalities_are_a_list_of_the_configs_own() -> None:
    """As a saved config has them, with which they are compared."""
    given = ["text", "vision"]
    config = MokaConfig(modalities=given)
    given.append("audio")
    assert config.modalities == MokaConfig(modalities=("text", "vision")).modalities == ["text", "vision"]


@pytest.mark.parametrize("names", [["vision", "audio"], ["vision", "text"], ["text", "text"], []])
def test_the_first_modality_is_the_text_path(names: list[str]) -> None:
    with pytest.raises(AdapterError, match="'text' first"):
        MokaConfig(modalities=names)


class TestWrap:
    def test_methods(self) -> None:
        options = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear", "keys": "question"}
        options |= {"attention_weight": 1.0, "attention_weight_pattern": None, "scale_logits": True}
        trainable = {}
        for method in METHODS:
            model = wrap(small_llm(), method, ["vision", "audio"], options)
            trainable[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert isinstance(getattr(model, "base_model", None), MokaModel) == (method in ROUTED)
            assert target_report(model) == ({} if method in ("full", "none") else SEVEN)
            set_routing(model, Routing(IDS, KEYS))
            assert logits_of(model).shape == (2, 8, 37)
        assert trainable["none"] == 0
        assert trainable["full"] == sum(p.numel() for p in small_llm().parameters())
        assert trainable["multi_lora"] == 3 * trainable["lora"]
        assert trainable["lora"] < trainable["moka"] < trainable["multi_lora"]

    def test_text_is_put_first_where_it_is_not_named(self) -> None:
        for names in (["vision"], ["text", "vision"]):
            model = wrap(small_llm(), "moka", names, {"r": 2})
            assert isinstance(model.base_model, MokaModel)
            assert model.peft_config["default"].modalities == ["text", "vision"]

    def test_multi_lora_is_one_lora_per_modality(self) -> None:
        model = randomise(wrap(small_llm(), "multi_lora", ["vision", "audio"], {"r": 3, "lora_alpha": 3}))
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        x = torch.randn(2, 8, 16, dtype=torch.float64)
        set_routing(model, Routing(IDS, KEYS))
        A, B = layer.moka_A["default"].weight, layer.moka_B["default"].weight
        for row, column in [(0, 1), (0, 3), (0, 4), (1, 0)]:
            m = int(IDS[row, column])
            update = B[:, 3 * m : 3 * m + 3] @ A[3 * m : 3 * m + 3] @ x[row, column]
            torch.testing.assert_close(layer(x)[row, column], layer.base_layer(x)[row, column] + update)

    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            ("mokka", {}, "Unknown adapter method 'mokka'; did you mean 'moka'"),
            ("moka", {"lora_alfa": 3}, "Unknown adapter option 'lora_alfa'; did you mean 'lora_alpha'"),
            ("moka", {"r": 0}, "r must be"),
            ("lora", {"r": 0}, "r must be"),
            ("lora", {"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ],
    )
    def test_what_is_refused(self, method: str, options: dict, message: str) -> None:
        with pytest.raises(AdapterError, match=message):
            wrap(small_llm(), method, ["vision"], options)
