"""MokA against a plain loop over tokens, written from the formula, in every layer of a small LLM (float64, 1e-10).

A batch is drawn as strings: t text, q a question's token (a key), v vision, a audio, _ padding.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from mokamm.adapters import MokaConfig, RoutedLinear
from mokamm.routing import Routing

BATCHES = {
    "ragged, scattered keys": ["tvvqaaqtqtt", "qvvvaaatttq", "tqvqaqvtttt"],
    "right padding": ["tvvqaaqtqtt", "qvvat______", "tvaq_______"],
    "left padding": ["tvvqaaqtqtt", "______qvvat", "_______tvaq"],
    "a sample without a question": ["tvvqaaqtqtt", "tvvvtaaattt", "________vvt"],
    "no question at all": ["tvvttaatttt", "vvvvvaaaaaa", "______tttvv"],
    "no media": ["ttqqqtttttt", "qqqqqq_____", "______ttttt"],
    "one modality missing, media before and after": ["vvvqqqttvvv", "vvvvvvvvvvq", "qvttttttttt"],
}


def routing_of(rows: list[str]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[{"v": 1, "a": 2, "_": -1}.get(letter, 0) for letter in row] for row in rows])
    return ids, torch.tensor([[letter == "q" for letter in row] for row in rows])


def small_llm(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def wrapped(llm: nn.Module, **options: object) -> nn.Module:
    model = get_peft_model(llm, MokaConfig(**{"r": 3, "lora_alpha": 5, **options})).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "moka_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.4
    return model


def loop(layer: RoutedLinear, weight: Tensor, x: Tensor, ids: Tensor, keys: Tensor, config: MokaConfig) -> Tensor:
    """h of the wrapped Linear, token by token."""
    r, s, lam = config.r, config.lora_alpha / config.r, config.attention_weight
    A = layer.moka_A["default"].weight.detach().split(r)
    B = layer.moka_B["default"].weight.detach()
    before, after = (s, 1.0) if config.scale_logits else (1.0, s)
    bias = layer.get_base_layer().bias
    h = nn.functional.linear(x, weight, bias)
    for b in range(len(x)):
        key_vectors = [before * A[0] @ x[b, q] for q in range(x.shape[1]) if keys[b, q]]
        for t in range(x.shape[1]):
            m = int(ids[b, t])
            if m < 0:
                continue
            z = before * A[m] @ x[b, t]
            if m > 0 and key_vectors:
                logits = [float(z @ key) / math.sqrt(r) for key in key_vectors]
                scores = [math.exp(logit - max(logits)) for logit in logits]  # a large alpha would overflow
                z = z + lam * sum(score / sum(scores) * key for score, key in zip(scores, key_vectors, strict=True))
            own_b = B if config.shared_b else B[:, m * r : (m + 1) * r]
            h[b, t] += after * own_b @ z
    return h


def record(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of every routed layer, filled by the forward passes to come."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, RoutedLinear):
            calls = seen.setdefault(name, [])
            module.register_forward_hook(lambda _, inputs, h, calls=calls: calls.append((inputs[0], h)))
    return seen


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale_logits": True},
        {"scale_logits": False, "attention_weight": 0.05},
        {"scale_logits": False, "shared_b": False, "attention_weight": 1.5},
        {"shared_b": False, "attention_weight": 0.0},
    ],
    ids=["scaled", "plain", "a B each, with attention", "multiple LoRA"],
)
def test_every_layer_equals_the_loop(options: dict, folded: bool) -> None:
    model = wrapped(small_llm(), **options)
    config = model.peft_config["default"]
    weights = {n: m.base_layer.weight.clone() for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    seen = record(model)
    if folded:
        model.base_model.fold_text()
    assert len(seen) == 14
    for name, rows in BATCHES.items():
        ids, keys = routing_of(rows)
        model.base_model.set_routing(Routing(ids, keys))
        x = torch.randn(*ids.shape, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            logits = model(inputs_embeds=x, attention_mask=(ids >= 0).long()).logits
        assert torch.isfinite(logits).all(), name
        for layer_name, calls in seen.items():
            (inputs, h), layer = calls.pop(), model.get_submodule(layer_name)
            expected = loop(layer, weights[layer_name], inputs, ids, keys, config)
            torch.testing.assert_close(h, expected, rtol=0, atol=1e-10, msg=f"{name}: {layer_name}")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rank_any_modalities_any_batch(data: st.DataObject) -> None:
    r, M = data.draw(st.integers(1, 19)), data.draw(st.integers(1, 6))
    rows, T = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    ids = torch.tensor(data.draw(st.lists(st.integers(-1, M - 1), min_size=rows * T, max_size=rows * T))).view(rows, T)
    keys = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * T, max_size=rows * T))).view(rows, T)
    keys &= ids == 0
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = wrapped(
        Tiny().double(), r=r, lora_alpha=data.draw(st.integers(1, 33)), target_modules=["proj"],
        modalities=["text", *map(str, range(1, M))], attention_weight=data.draw(st.floats(-2, 2)),
        scale_logits=data.draw(st.booleans()), shared_b=data.draw(st.booleans()),
    )  # fmt: skip
    layer, x = model.base_model.model.proj, torch.randn(rows, T, 5, dtype=torch.float64)
    weight = layer.base_layer.weight.detach().clone()
    model.base_model.set_routing(Routing(ids, keys))
    with torch.no_grad():
        expected = loop(layer, weight, x, ids, keys, model.peft_config["default"])
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        model.base_model.fold_text()
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        model.base_model.unfold_text()
    assert torch.equal(layer.base_layer.weight, weight)


def test_attention_weight_pattern_sets_lambda_per_layer() -> None:
    model = wrapped(small_llm(), attention_weight=0.3, attention_weight_pattern={r"layers\.1\..*": 0.0, "v_proj": 2.0})
    found = {n: m.settings["default"].attention_weight for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    assert {value for name, value in found.items() if "layers.1." in name} == {0.0}
    assert {value for name, value in found.items() if "layers.0." in name and "v_proj" in name} == {2.0}
    assert {value for name, value in found.items() if "layers.0." in name and "v_proj" not in name} == {0.3}


def prompts(model: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left-padded embeddings, their mask, and their routing."""
    ids, keys = routing_of(["tvvqaaqtqtt", "______qvvat", "___ttttqqqt"])
    x = torch.randn(*ids.shape, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, (ids >= 0).long(), ids, keys


@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_generation_with_a_cache_equals_full_recompute(folded: bool) -> None:
    model = wrapped(small_llm())
    x, mask, ids, keys = prompts(model)
    embed = model.get_input_embeddings()
    model.base_model.set_routing(Routing(ids, keys))
    if folded:
        model.base_model.fold_text()
    steps: list[Tensor] = []  # generate itself rounds its logits to float32
    hook = model.get_output_embeddings().register_forward_hook(lambda _, inputs, logits: steps.append(logits[:, -1]))
    sequences = model.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=5, do_sample=False)
    hook.remove()
    model.base_model.unfold_text()
    assert len(steps) == 5
    for step, logits in enumerate(steps):
        more = sequences[:, :step]
        full = torch.cat([x, embed(more)], 1)
        full_mask = torch.cat([mask, torch.ones_like(more)], 1)
        routing = Routing(torch.cat([ids, torch.zeros_like(more)], 1), torch.cat([keys, more < 0], 1))
        model.base_model.set_routing(routing)
        with torch.no_grad():
            out = model(
                inputs_embeds=full, attention_mask=full_mask, position_ids=(full_mask.cumsum(1) - 1).clamp(min=0)
            )
        torch.testing.assert_close(logits, out.logits[:, -1], rtol=0, atol=1e-10)
        assert torch.equal(sequences[:, step], out.logits[:, -1].argmax(-1))


def test_beams_repeat_rows_at_prefill() -> None:
    model = wrapped(small_llm())
    x, mask, ids, keys = prompts(model)
    weights = {n: m.base_layer.weight for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    beam = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "do_sample": False}
    seen = record(model)
    model.base_model.set_routing(Routing(ids, keys))
    together = model.generate(inputs_embeds=x, attention_mask=mask, **beam)
    for name, calls in seen.items():
        inputs, h = calls[0]
        times = len(inputs) // len(ids)
        rows = ids.repeat_interleave(times, 0), keys.repeat_interleave(times, 0)
        expected = loop(model.get_submodule(name), weights[name], inputs, *rows, model.peft_config["default"])
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-10)
    for row in range(len(ids)):
        model.base_model.set_routing(Routing(ids[row : row + 1], keys[row : row + 1]))
        alone = model.generate(inputs_embeds=x[row : row + 1], attention_mask=mask[row : row + 1], **beam)
        assert torch.equal(alone, together[2 * row : 2 * row + 2])


def test_an_answer_changes_nothing_before_it() -> None:
    """Media tokens read the question that follows them, never the answer."""
    model = wrapped(small_llm())
    ids, keys = routing_of(["tvvqaaqtttt", "qvvattttttt"])
    model.base_model.set_routing(Routing(ids, keys))
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 7:] = torch.randn(2, 4, 16, dtype=torch.float64)
    question = x.clone()
    question[0, 6] += 1.0
    with torch.no_grad():
        first, second, third = (model(inputs_embeds=e).logits for e in (x, other, question))
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 7:], second[:, 7:])
    assert not torch.allclose(first[0, 1], third[0, 1])  # the first media token did read the question's last token


def test_an_llm_that_flattens_its_batch() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=37, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = wrapped(OPTForCausalLM(config).double().eval())
    ids, keys = routing_of(["tvvqaaqtqtt", "qvvat______"])
    seen = record(model)
    weights = {n: m.base_layer.weight for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    model.base_model.set_routing(Routing(ids, keys))
    with torch.no_grad():
        x = torch.randn(*ids.shape, 16, dtype=torch.float64)
        model(inputs_embeds=x, attention_mask=(ids >= 0).long())
    for name, calls in seen.items():
        inputs, h = (tensor.view(*ids.shape, -1) for tensor in calls[0])
        expected = loop(model.get_submodule(name), weights[name], inputs, ids, keys, model.peft_config["default"])
        torch.testing.assert_close(h, expected, rtol=0, atol=1e-10)
