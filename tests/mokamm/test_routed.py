"""MokA against a plain loop over tokens, written from the formula, in every layer of a small LLM (float64, 1e-10).

A batch is drawn as strings: t text, q a question's token (a key), v vision, a audio, _ padding.
"""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from mokamm.adapters import MokaConfig, RoutedLinear
from mokamm.routing import AdapterError, Routing

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


class TestAfterAPrompt:
    """What goes on from a prompt's cache is not the prompt, whatever its shape."""

    IDS = torch.tensor([[1, 1, 0, 0]])

    def after(self, model: nn.Module, ids: Tensor, rows: int = 1) -> tuple[Tensor, Cache]:
        """A prompt that ran, and the cache it left."""
        prompt = torch.randn(1, ids.shape[1], 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        cache = DynamicCache()
        model.base_model.set_routing(Routing(ids, ids == 0))
        model(inputs_embeds=prompt.expand(rows, -1, -1), past_key_values=cache)
        return prompt, cache

    def expected(self, model: nn.Module, ids: Tensor, prompt: Tensor, tokens: Tensor) -> Tensor:
        """The last logits where prompt and tokens are read at once, the tokens as text that is no key."""
        rows, text = ids.expand(len(tokens), -1), torch.zeros_like(tokens)
        routing = Routing(torch.cat([rows, text], 1), torch.cat([rows == 0, text.bool()], 1))
        model.base_model.set_routing(routing)
        x = torch.cat([prompt.expand(len(tokens), -1, -1), model.get_input_embeddings()(tokens)], 1)
        return model(inputs_embeds=x, use_cache=False).logits[:, -1]

    @torch.no_grad()
    def test_as_many_tokens_as_the_prompts_are_refused(self) -> None:
        model = wrapped(small_llm())
        prompt, cache = self.after(model, self.IDS)
        with pytest.raises(
            AdapterError, match=r"several tokens .* go on from its cache.* one by one.*prompt_lookup_num_tokens"
        ):
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
        with pytest.raises(AdapterError, match=r"several tokens .* go on from its cache"):
            model(torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)  # not by name
        with model.disable_adapter():  # the base alone may
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
        cache.crop(-4)
        step = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits[:, -1]
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert layer.context.look_up(prompt) is layer.context.routing  # a layer called by itself has the prompt's again
        expected = self.expected(model, self.IDS, prompt, torch.tensor([[5]]))
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_a_step_that_failed_is_over(self) -> None:
        model = wrapped(small_llm())
        prompt, cache = self.after(model, self.IDS)
        expected = model(inputs_embeds=prompt).logits
        wrong = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        wrong.remove()
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert layer.context.look_up(prompt) is layer.context.routing
        assert torch.equal(model(inputs_embeds=prompt).logits, expected)

    @torch.no_grad()
    def test_a_routing_set_for_what_follows_a_prefix_holds_there(self) -> None:
        model = wrapped(small_llm())
        prompt, cache = self.after(model, torch.zeros(1, 3, dtype=torch.long))
        more, ids = torch.randn(1, 4, 16, dtype=torch.float64), self.IDS
        model.base_model.set_routing(Routing(ids, ids == 0))
        found = model(inputs_embeds=more, past_key_values=cache).logits
        text = torch.zeros(1, 3, dtype=torch.long)
        model.base_model.set_routing(Routing(torch.cat([text, ids], 1), torch.cat([text.bool(), ids == 0], 1)))
        whole = model(inputs_embeds=torch.cat([prompt, more], 1)).logits[:, 3:]
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_two_prompts_that_begin_from_copies_of_one_cache(self) -> None:
        model = wrapped(small_llm())
        _, cache = self.after(model, torch.zeros(1, 5, dtype=torch.long))
        more, ids = torch.randn(1, 4, 16, dtype=torch.float64), self.IDS
        model.base_model.set_routing(Routing(ids, ids == 0))
        first, second = (model(inputs_embeds=more, past_key_values=copy.deepcopy(cache)).logits for _ in range(2))
        assert torch.equal(first, second)

    @torch.no_grad()
    def test_a_step_in_one_thread_leaves_a_prompt_in_another_alone(self) -> None:
        model, steps = wrapped(small_llm()), threading.Event()
        prompt, cache = self.after(model, self.IDS)
        expected = model(inputs_embeds=prompt).logits
        layer, reached = model.get_submodule("base_model.model.model.layers.0.self_attn"), threading.Event()

        def wait(*_: object) -> None:  # in the midst of a step, until the prompt has run
            if threading.current_thread() is not threading.main_thread():
                reached.set()
                steps.wait(60)

        hook = layer.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(
                torch.no_grad()(lambda: model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits)
            )
            assert reached.wait(60)
            found = model(inputs_embeds=prompt).logits
            steps.set()
        hook.remove()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        alone = self.expected(model, self.IDS, prompt, torch.tensor([[5]]))
        torch.testing.assert_close(step.result()[:, -1], alone, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("folded", [False, True])
    @torch.no_grad()
    def test_a_prompt_of_one_media_token(self, folded: bool) -> None:
        model, ids, token = wrapped(small_llm()), torch.tensor([[1]]), torch.tensor([[5]])
        if folded:
            model.base_model.fold_text()
        prompt, cache = self.after(model, ids)
        step = model(input_ids=token, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, self.expected(model, ids, prompt, token), rtol=0, atol=1e-10)

    def test_generation_from_a_prompt_of_one_media_token(self) -> None:
        model, ids = wrapped(small_llm()), torch.tensor([[1]])
        prompt, _ = self.after(model, ids)
        settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        found = model.generate(inputs_embeds=prompt, attention_mask=torch.ones_like(ids), **settings)
        for step, logits in enumerate(found.logits[1:], 1):
            expected = self.expected(model, ids, prompt, found.sequences[:, :step])
            torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("rows", [1, 4, 8])
    @torch.no_grad()
    def test_beams_of_an_llm_that_flattens_its_steps(self, rows: int) -> None:
        """As many rows as the prompt has tokens, or a multiple, look like the prompt in Qwen2-MoE's shared expert."""
        torch.manual_seed(0)
        config = Qwen2MoeConfig(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=8, shared_expert_intermediate_size=8,
        )  # fmt: skip
        llm = Qwen2MoeForCausalLM(config).double().eval()
        llm.set_experts_implementation("eager")  # the fused one has no float64
        model = wrapped(llm, exclude_modules=r".*\.experts\..*")
        prompt, cache = self.after(model, self.IDS, rows)
        tokens = torch.arange(3, 3 + rows)[:, None]
        step = model(input_ids=tokens, past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(step, self.expected(model, self.IDS, prompt, tokens), rtol=0, atol=1e-10)

    def test_static_caches_and_a_second_generation_under_one_routing(self) -> None:
        model = wrapped(small_llm())
        x, mask, ids, keys = prompts(model)
        model.base_model.set_routing(Routing(ids, keys))
        settings = {"inputs_embeds": x, "attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        dynamic = model.generate(**settings)
        for _ in range(2):
            assert torch.equal(model.generate(**settings, cache_implementation="static"), dynamic)

    def test_decoding_that_checks_several_tokens_is_refused(self) -> None:
        model, tokens = wrapped(small_llm()), torch.tensor([[5, 6, 5, 6, 5, 6]])
        model.base_model.set_routing(Routing(torch.tensor([[1, 1, 0, 0, 0, 0]]), tokens < 0))
        with pytest.raises(AdapterError, match="assisted or prompt-lookup decoding"):
            model.generate(input_ids=tokens, max_new_tokens=8, prompt_lookup_num_tokens=5, do_sample=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_weight": float("nan")}, "attention_weight must be a finite number; found nan"),
        ({"attention_weight_pattern": {"q_proj": float("inf")}}, "that of 'q_proj' must be a finite number"),
        ({"attention_weight_pattern": {"[": 0.0}}, r"'\[' is no regular expression"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be above 0 and finite"),
    ],
)
def test_a_config_that_could_not_compute_is_refused(options, message):
    with pytest.raises(AdapterError, match=message):
        MokaConfig(modalities=["text", "audio"], **options)
