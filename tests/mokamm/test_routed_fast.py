"""The routed layer's fast path against its plain one and float64: outputs and every gradient; when it steps aside."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from eval.speed.counting import saved_bytes
from mokamm.adapters import AdapterError, MokaConfig, RoutedLinear, routed, set_routing
from mokamm.adapters.routed_fast import together
from mokamm.routing import Routing

BATCHES = {
    "ragged": ["tvvqaaqtqtt_", "qvvvaaatttq_", "tqvqaqvtttt_"],
    "left padding, a sample without question": ["tvvqaaqtqttt", "______qvvatt", "_______tvatt"],
    "no question at all": ["tvvttaattttt", "vvvvvaaaaaaa", "______ttttvv"],
    "no padding": ["tvvqaaqtqttt", "qvvvaaatttqt"],
    "text alone": ["tttqqqtttttt", "qqqqqq______", "tttttttttttt"],
}
FAMILY = {
    "scaled": {},
    "plain logits": {"scale_logits": False, "attention_weight": 0.05},
    "no attention": {"attention_weight": 0.0},
    "a B each": {"shared_b": False, "attention_weight": 1.5, "scale_logits": False},
    "multi lora": {"shared_b": False, "attention_weight": 0.0},
    "one medium": {"modalities": ["text", "vision"]},
}
WIDTH, OUT = 24, 20


def routing_of(rows: list[str], modalities: int = 3) -> Routing:
    ids = torch.tensor([[{"v": 1, "a": 2, "_": -1}.get(letter, 0) for letter in row] for row in rows])
    return Routing(ids.clamp(max=modalities - 1), torch.tensor([[letter == "q" for letter in row] for row in rows]))


def layer_of(base: nn.Module | None = None, dtype: torch.dtype = torch.float64, **options: object) -> RoutedLinear:
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, OUT, bias=False) if base is None else base
    config = MokaConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["proj"], **options})
    model = get_peft_model(nn.ModuleDict({"proj": base}).to(dtype), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "moka_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.4
    layer = model.base_model.model["proj"]
    layer.model = [model]  # keeps it alive, unseen by torch
    return layer


def is_fast(h: Tensor) -> bool:
    return h.grad_fn.name() in ("_TogetherBackward", "_UpBackward")


def run(layer: RoutedLinear, routing: Routing, fast: bool, x: Tensor | None = None) -> dict[str, Tensor]:
    """h and the gradients of x, A and B."""
    layer.zero_grad()
    layer.context.routing = routing
    dtype = next(layer.base_layer.parameters()).dtype
    if x is None:
        rows, T = routing.shape or (2, 12)
        x = torch.randn(rows, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    x = x.detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if not fast:
            patch.setattr(RoutedLinear, "_can_be_fast", lambda *args: False)
        h = layer(x)
    assert is_fast(h) is fast
    h.backward(torch.randn(h.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(h.dtype))
    found = {"h": h.detach(), "x": x.grad}
    for name, parameter in layer.named_parameters():
        if "moka_" in name and parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """In the Frobenius norm, relative; what is zero is exactly zero."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = value.double().norm()
        assert (found[name].double() - value.double()).norm() <= tolerance * scale, name


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", FAMILY)
def test_both_paths_agree(method: str, batch: str) -> None:
    options = FAMILY[method]
    routing = routing_of(BATCHES[batch], len(options.get("modalities", "123")))
    exact = run(layer_of(**options), routing, fast=False)
    assert_close(run(layer_of(**options), routing, fast=True), exact, 1e-12)
    for fast in (True, False):
        assert_close(run(layer_of(dtype=torch.float32, **options), routing, fast), exact, 1e-5)


@pytest.mark.parametrize("adapter", ["float32 adapter", "bfloat16 adapter", "autocast", "autocast of a bfloat16 base"])
@pytest.mark.parametrize("method", ["scaled", "a B each"])
def test_bfloat16_agrees_with_float64(method: str, adapter: str) -> None:
    options = {**FAMILY[method], "lora_alpha": 3}
    routing = routing_of(BATCHES["ragged"])
    exact_layer = layer_of(**options)
    for parameter in exact_layer.parameters():  # the same numbers for both
        parameter.data = parameter.data.bfloat16().double()
    x = torch.randn(3, 12, WIDTH, generator=torch.Generator().manual_seed(4)).bfloat16()
    exact = run(exact_layer, routing, False, x.double())
    layer = layer_of(dtype=torch.float32 if adapter == "autocast" else torch.bfloat16, **options)
    for own, other in zip(layer.parameters(), exact_layer.parameters(), strict=True):
        own.data = other.data.to(own.dtype)
    if adapter == "bfloat16 adapter":
        layer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in adapter):
        found = run(layer, routing, True, x.to(layer.base_layer.weight.dtype))
    for name, value in found.items():
        assert value.dtype == dict(layer.named_parameters()).get(name, found["h"] if name == "h" else found["x"]).dtype
    assert found["x"].dtype == layer.base_layer.weight.dtype
    assert_close(found, exact, 2e-2)


@pytest.mark.parametrize("method", FAMILY)
def test_gradients_are_the_derivatives(method: str) -> None:
    options = FAMILY[method]
    layer = layer_of(**options)
    x = torch.randn(3, 12, WIDTH, dtype=torch.float64, requires_grad=True)
    for routing in (routing_of(BATCHES["ragged"], len(options.get("modalities", "123"))), Routing.text_only()):
        layer.context.routing = routing

        def h(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            parameters = {"moka_A.default.weight": a, "moka_B.default.weight": b}
            return torch.func.functional_call(layer, parameters, (x,))

        inputs = (x, layer.moka_A["default"].weight, layer.moka_B["default"].weight)
        assert is_fast(h(*inputs))
        assert torch.autograd.gradcheck(h, inputs, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"frozen_a": True}])
def test_text_only_frozen_a_and_an_input_without_gradient(options: dict) -> None:
    for routing in (Routing.text_only(), routing_of(BATCHES["ragged"])):
        layer = layer_of(**options)
        fast, plain = (run(layer, routing, way) for way in (True, False))
        assert ("moka_A.default.weight" in fast) is not bool(options)
        assert_close(fast, plain, 1e-12)
        x, grads = torch.randn(3, 12, WIDTH, dtype=torch.float64), []
        for own in (x, x.clone().requires_grad_()):
            layer.zero_grad()
            layer(own).square().sum().backward()
            grads.append(layer.moka_B["default"].weight.grad.clone())
        assert torch.equal(*grads)
        with torch.no_grad():
            h = layer(x)
        assert h.grad_fn is None
        torch.testing.assert_close(h, layer(x).detach(), rtol=0, atol=1e-12)


def test_layouts_of_the_input() -> None:
    routing, layer = routing_of(BATCHES["ragged"]), layer_of()
    x = torch.randn(3, 12, WIDTH, dtype=torch.float64)
    expected = run(layer, routing, True, x)
    turned = run(layer, routing, True, x.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    assert_close(turned, expected, 1e-12)
    flat = run(layer, routing, False, x.view(36, WIDTH))
    assert_close(run(layer, routing, True, x.view(36, WIDTH)), flat, 1e-12)


def test_base_layers_of_other_kinds() -> None:
    class Tanh(nn.Linear):  # its derivative needs its output
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    routing = routing_of(BATCHES["ragged"])
    for base in (nn.Linear(WIDTH, OUT), Conv1D(OUT, WIDTH), Tanh(WIDTH, OUT)):
        layer = layer_of(base)
        assert_close(run(layer, routing, True), run(layer, routing, False), 1e-12)


@pytest.mark.parametrize("trained", [["weight", "bias"], ["bias"]], ids=["all of it", "its bias"])
def test_a_trained_base_layer(trained: list[str]) -> None:
    routing, layer = routing_of(BATCHES["ragged"]), layer_of(nn.Linear(WIDTH, OUT))
    parameters = [getattr(layer.base_layer, name).requires_grad_(True) for name in trained]
    grads = []
    for fast in (True, False):
        layer.base_layer.zero_grad()
        run(layer, routing, fast)
        grads.append([parameter.grad.clone() for parameter in parameters])
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_hooks_see_the_base_layers_own_output_and_gradient() -> None:
    routing, layer = routing_of(BATCHES["ragged"]), layer_of()
    expected = run(layer, routing, True)
    seen: dict[str, Tensor] = {}
    layer.base_layer.register_forward_hook(lambda module, inputs, h: seen.update(h=h))
    layer.base_layer.register_full_backward_hook(lambda module, dx, dh: seen.update(dx=dx[0]))
    assert_close(run(layer, routing, True), expected, 1e-12)
    x = torch.randn(3, 12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    g = torch.randn(3, 12, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight = layer.base_layer.weight
    torch.testing.assert_close(seen["h"], x @ weight.T)
    torch.testing.assert_close(seen["dx"], g @ weight)


def test_backward_twice_and_what_is_refused() -> None:
    layer = layer_of()
    layer.context.routing = routing_of(BATCHES["ragged"])
    x = torch.randn(3, 12, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = layer(x).square().sum()
    once = torch.autograd.grad(loss, [x, layer.moka_A["default"].weight], retain_graph=True)
    again = torch.autograd.grad(loss, [x, layer.moka_A["default"].weight], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    alone = torch.autograd.grad(loss, [layer.moka_B["default"].weight], retain_graph=True)
    assert alone[0].any()
    (dx,) = torch.autograd.grad(loss, [x], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_several_adapters_and_a_disabled_one() -> None:
    routing, layer = routing_of(BATCHES["ragged"]), layer_of(nn.Linear(WIDTH, OUT))
    (model,) = layer.model
    model.add_adapter("other", MokaConfig(r=5, target_modules=["proj"], shared_b=False))
    for parameter in (*layer.moka_A["other"].parameters(), *layer.moka_B["other"].parameters()):
        nn.init.normal_(parameter, std=0.3)
    model.base_model.set_adapter(["default", "other"])
    both = run(layer, routing, True)
    assert len(both) == 6
    assert_close(both, run(layer, routing, False), 1e-12)
    with model.disable_adapter():
        x = torch.randn(3, 12, WIDTH, dtype=torch.float64)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_draws_what_nn_dropout_draws() -> None:
    routing, layer = routing_of(BATCHES["ragged"]), layer_of(lora_dropout=0.3)
    results = []
    for fast in (True, False):
        torch.manual_seed(7)
        results.append(run(layer.train(), routing, fast))
    assert_close(*results, 1e-12)
    without = run(layer.eval(), routing, True)
    assert not torch.allclose(without["h"], results[0]["h"])
    assert_close(without, run(layer, routing, False), 1e-12)


def test_it_steps_aside() -> None:
    """Keys that are not text are read by the plain path, and so is what a compiler traces."""
    layer, x = layer_of(), torch.randn(1, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    layer.context.routing = Routing(torch.tensor([[0, 1, 2, 0]]), torch.tensor([[False, True, False, True]]))
    assert not layer.context.routing.keys_are_text
    assert not is_fast(layer(x))
    layer.context.routing = Routing(torch.tensor([[0, 1, 2, 0]]), torch.tensor([[False, False, False, True]]))
    assert is_fast(layer(x))
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)
    grads = [
        torch.autograd.grad(module(x).square().sum(), layer.moka_A["default"].weight) for module in (layer, compiled)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)


def test_a_folded_step_is_the_base_layer_and_hooks_still_run() -> None:
    layer = layer_of(nn.Linear(WIDTH, OUT)).eval()
    layer.context.routing = routing_of(BATCHES["ragged"])
    x = torch.randn(3, 1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        layer.fold_text()
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        calls = []
        layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert calls == [1]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_keeps_no_more_for_backward_than_lora(dropout: float) -> None:
    x = torch.randn(3, 12, WIDTH, requires_grad=True)
    options = {"r": 3, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": ["proj"]}
    kept = []
    for config in (MokaConfig(**options), LoraConfig(**options)):
        model = get_peft_model(nn.ModuleDict({"proj": nn.Linear(WIDTH, OUT, bias=False)}), config).train()
        set_routing(model, routing_of(BATCHES["ragged"]))
        kept.append(saved_bytes(lambda model=model: model.base_model.model["proj"](x)))
    assert kept[0] <= kept[1]
    assert dropout or kept[1] == x.nbytes + 36 * 3 * 4


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_frozen_a_keeps_no_input_for_backward(dropout: float, hook: bool) -> None:
    x = torch.randn(3, 12, WIDTH, requires_grad=True)
    options = {"r": 3, "lora_alpha": 6, "lora_dropout": dropout, "target_modules": ["proj"]}
    model = get_peft_model(
        nn.ModuleDict({"proj": nn.Linear(WIDTH, OUT, bias=False)}), MokaConfig(**options, frozen_a=True, a_seed=1)
    ).train()
    set_routing(model, routing_of(BATCHES["ragged"]))
    layer = model.base_model.model["proj"]
    if hook:  # by _Down and _Up, not in one
        layer.base_layer.register_forward_hook(lambda *args: None)
    assert saved_bytes(lambda: layer(x)) == 36 * 3 * 4 + (x.numel() if dropout else 0)
    layer(x).sum().backward()
    assert x.grad is not None


class TestSiblings:
    """q, k and v, and gate and up, are computed together: the numbers of the plain path, whatever happens between."""

    IDS = torch.tensor([[0, 1, 1, 2, 0, 0, 0, -1], [1, 1, 0, 0, 2, 2, 0, 0]])
    KEYS = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 1, 0]]).bool()

    def llm(self, **options: object) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, attention_bias=True,
        )  # fmt: skip
        model = get_peft_model(LlamaForCausalLM(config).double(), MokaConfig(**{"r": 3, "lora_alpha": 5, **options}))
        for name, parameter in model.named_parameters():
            if "moka_" in name:
                nn.init.normal_(parameter, std=0.3)
        return model.train()

    def test_inference_mode_computes_what_no_grad_does(self) -> None:
        model = self.llm().eval()
        set_routing(model, Routing(self.IDS, self.KEYS))
        x = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = model(inputs_embeds=x).logits
        with torch.inference_mode():
            found = model(inputs_embeds=x.clone()).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def gradients(self, model: nn.Module, fast: bool = True) -> dict[str, Tensor]:
        model.zero_grad()
        set_routing(model, Routing(self.IDS, self.KEYS))
        x = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if not fast:
                patch.setattr(RoutedLinear, "_can_be_fast", lambda *args: False)
            torch.manual_seed(5)
            logits = model(inputs_embeds=x, use_cache=False).logits
            logits.square().sum().backward()
        assert not any(layer.siblings.waiting or layer.siblings.children for layer in model.base_model.routed_layers())
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach(), "x": x.grad, **found}

    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    @pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "non-reentrant"])
    def test_in_an_llm(self, dropout: float, checkpointing: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
        model, calls = self.llm(lora_dropout=dropout), []
        expected = self.gradients(model, fast=False)
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        monkeypatch.setattr(routed, "together", lambda *args: calls.append(len(args[1])) or together(*args))
        assert_close(self.gradients(model), expected, 1e-11)
        assert calls[:4] == [3, 1, 2, 1]  # q k v, o, gate up, down
        assert len(expected) == 30

    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    @pytest.mark.parametrize("alone", [False, True])
    def test_a_frozen_a_which_keeps_no_input(self, dropout: float, alone: bool) -> None:
        model = self.llm(lora_dropout=dropout, frozen_a=True, a_seed=1)
        if alone:  # by _Down and _Up
            for layer in model.base_model.routed_layers():
                layer.base_layer.register_forward_hook(lambda *_: None)
        expected = self.gradients(model, fast=False)
        assert_close(self.gradients(model), expected, 1e-11)
        assert len(expected) == 16

    def test_text_alone(self) -> None:
        model = self.llm()
        results = []
        for fast in (True, False):
            model.zero_grad()
            with pytest.MonkeyPatch.context() as patch:
                if not fast:
                    patch.setattr(RoutedLinear, "_can_be_fast", lambda *args: False)
                set_routing(model, Routing.text_only())
                model(input_ids=self.IDS.clamp(min=0), use_cache=False).logits.square().sum().backward()
            results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert_close(*results, 1e-11)

    def test_other_settings_disabled_ones_and_other_kinds_run_alone(self) -> None:
        def disable(model: nn.Module) -> None:  # as CoTo does
            model.base_model.model.model.layers[0].self_attn.k_proj._disable_adapters = True

        def hook(model: nn.Module) -> None:
            model.base_model.model.model.layers[1].self_attn.k_proj.base_layer.register_forward_hook(lambda *_: None)

        def train_base(model: nn.Module) -> None:
            model.base_model.model.model.layers[1].mlp.up_proj.base_layer.requires_grad_(True)

        pattern = {"attention_weight_pattern": {"v_proj": 0.0, r"layers\.1\.mlp\.up_proj": 2.0}}
        for options, change in [
            (pattern, None),
            ({}, disable),
            ({}, hook),
            ({}, train_base),
            ({"shared_b": False}, None),
        ]:
            model = self.llm(**options)
            if change:
                change(model)
            assert_close(self.gradients(model), self.gradients(model, fast=False), 1e-11)

    def parts(self, **options: object) -> tuple[nn.Module, Any, Tensor]:
        model = self.llm(**options)
        set_routing(model, Routing(self.IDS, self.KEYS))
        x = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        return model, model.base_model.model.model.layers[0].self_attn, x

    def test_another_input_or_a_changed_one_is_computed_anew(self) -> None:
        model, attention, x = self.parts()
        other = torch.randn_like(x)
        waiting, running = attention.k_proj.siblings, attention.k_proj.siblings._begin
        with torch.no_grad():
            expected = {id(t): attention.k_proj(t) for t in (x, other)}
            assert waiting.waiting is None
            running(attention)
            attention.q_proj(x)
            assert set(waiting.waiting.outputs) == {attention.k_proj, attention.v_proj}
            with model.disable_adapter():
                assert torch.equal(attention.k_proj(x), attention.k_proj.base_layer(x))
            assert waiting.waiting is None
            attention.q_proj(x)
            torch.testing.assert_close(attention.k_proj(other), expected[id(other)], rtol=0, atol=1e-12)
            attention.q_proj(x)
            torch.testing.assert_close(attention.k_proj(x), expected[id(x)], rtol=0, atol=1e-12)
            attention.q_proj(x)
            x.mul_(2)
            changed = attention.k_proj(x)
            assert not torch.allclose(changed, expected[id(x)])
            attention.q_proj(x)
            set_routing(model, Routing(self.IDS.clamp(max=0), self.KEYS))
            assert not torch.allclose(attention.k_proj(x), changed)
            attention.q_proj(x)
        assert attention.v_proj(x).requires_grad
        attention.q_proj(x)
        twin = copy.deepcopy(model)
        own = twin.base_model.model.model.layers[0].self_attn
        siblings = own.q_proj.siblings
        assert siblings is own.k_proj.siblings is not waiting
        assert siblings.children is siblings.waiting is None
        siblings._begin(own)
        assert siblings.others(own.q_proj) == [own.k_proj, own.v_proj]

    def test_layers_called_by_themselves_share_nothing(self) -> None:
        """Weights, modes and graphs may change between one call and the next."""
        _, attention, x = self.parts()
        q, k = attention.q_proj, attention.k_proj
        before = k(x)
        q(x)
        with torch.no_grad():
            k.moka_B["default"].weight.mul_(2)
        torch.testing.assert_close(k(x) - k.base_layer(x), 2 * (before - k.base_layer(x)))
        q(x).sum().backward()
        k(x).sum().backward()
        assert all(layer.moka_A["default"].weight.grad is not None for layer in (q, k))
        assert attention.v_proj.moka_A["default"].weight.grad is None
        q(x)
        x.requires_grad_()
        k(x).sum().backward()
        assert x.grad is not None

    def test_a_parent_that_fails_or_lost_a_child_leaves_nothing(self) -> None:
        model, attention, x = self.parts()
        wrong = attention.o_proj.base_layer.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(inputs_embeds=x)
        assert attention.q_proj.siblings.waiting is attention.q_proj.siblings.children is None
        wrong.remove()
        former, attention.k_proj = attention.k_proj, attention.k_proj.base_layer
        calls: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(routed, "together", lambda *args: calls.append(len(args[1])) or together(*args))
            model(inputs_embeds=x)
        assert calls[0] == 2  # q and v
        assert former.moka_A["default"].weight.grad is None

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_within_the_parent(self, reentrant: bool) -> None:
        """It runs again without the parent, and must keep the same tensors then."""

        class Inside(nn.ModuleDict):
            def inner(self, x: Tensor) -> Tensor:
                return self["q_proj"](x) * self["k_proj"](x) + self["v_proj"](x)

            def forward(self, x: Tensor, checkpointed: bool) -> Tensor:
                return checkpoint(self.inner, x, use_reentrant=reentrant) if checkpointed else self.inner(x)

        torch.manual_seed(0)
        parts = Inside({name: nn.Linear(16, 16).double() for name in ("q_proj", "k_proj", "v_proj")})
        model = get_peft_model(nn.ModuleDict({"attention": parts}), MokaConfig(r=3, target_modules=list(parts)))
        for name, parameter in model.named_parameters():
            if "moka_" in name:
                nn.init.normal_(parameter, std=0.3)
        set_routing(model, Routing(self.IDS, self.KEYS))
        attention, found = model.base_model.model["attention"], []
        for checkpointed in (False, True):
            x = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
            model.zero_grad()
            attention(x, checkpointed).square().sum().backward()
            found.append({"x": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        assert_close(*found, 1e-11)

    def test_one_layer_copied_alone_brings_nothing_of_its_parent(self) -> None:
        _, attention, x = self.parts()
        attention.register_forward_hook(lambda *_: None)
        attention.lock = threading.Lock()  # which cannot be copied
        alone = copy.deepcopy(attention.q_proj)
        torch.testing.assert_close(alone(x), attention.q_proj(x))

    def test_unloading_leaves_no_hook(self) -> None:
        model, attention, _ = self.parts()
        model.add_adapter("more", MokaConfig(r=2, target_modules=["q_proj", "v_proj"]))
        assert len(attention._forward_hooks) == len(attention._forward_pre_hooks) == 1
        model.unload()
        assert not attention._forward_hooks
        assert not attention._forward_pre_hooks

    def test_two_threads_that_run_one_model(self) -> None:
        model, _, x = self.parts()
        set_routing(model, Routing.text_only())
        model.eval()
        inputs = [torch.randn_like(x) for _ in range(4)]
        with torch.no_grad():
            expected = [model(inputs_embeds=one, use_cache=False).logits for one in inputs]

        def ask(one: Tensor) -> list[Tensor]:
            with torch.no_grad():
                return [model(inputs_embeds=one, use_cache=False).logits for _ in range(20)]

        with ThreadPoolExecutor(4) as pool:
            for found, wanted in zip(pool.map(ask, inputs), expected, strict=True):
                for logits in found:
                    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)

    def test_an_attention_that_reads_two_inputs_has_none(self) -> None:
        parts = {name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        model = nn.ModuleDict({"cross_attn": nn.ModuleDict(parts), "self_attn": nn.ModuleDict(copy.deepcopy(parts))})
        get_peft_model(model, MokaConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
        sizes = {name: len(layer.siblings.names) for name, layer in model.named_modules() if hasattr(layer, "siblings")}
        assert {name for name, size in sizes.items() if size == 3} == {f"self_attn.{n}_proj" for n in "qkv"}
        assert sizes["cross_attn.q_proj"] == sizes["self_attn.o_proj"] == 0


class TestTransforms:
    """torch.func, forward mode and tracing get plain operators, whose derivatives they know."""

    def parts(self) -> tuple[RoutedLinear, Tensor]:
        layer = layer_of()
        layer.context.routing = routing_of(BATCHES["ragged"])
        return layer, torch.randn(3, 12, WIDTH, dtype=torch.float64)

    def test_torch_func(self) -> None:
        layer, x = self.parts()
        y = x.clone().requires_grad_()
        layer(y).square().sum().backward()
        torch.testing.assert_close(torch.func.grad(lambda x: layer(x).square().sum())(x), y.grad)
        tangent = torch.randn_like(x)
        _, pushed = torch.func.jvp(lambda x: layer(x).square().sum(), (x,), (tangent,))
        torch.testing.assert_close(pushed, (y.grad * tangent).sum())
        several = torch.stack([x, 2 * x])
        torch.testing.assert_close(torch.func.vmap(layer)(several), torch.stack([layer(x), layer(2 * x)]))
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        hessian_vector = torch.func.jvp(
            torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum()),
            (parameters,),
            (parameters,),
        )[1]
        assert all(tensor.isfinite().all() for tensor in hessian_vector.values())
        copy.deepcopy(layer.context)  # the routing keeps nothing of the transforms

    def test_a_folded_layer_under_torch_func(self) -> None:
        layer, x = self.parts()
        layer.eval().fold_text()
        torch.testing.assert_close(
            torch.func.vmap(layer)(torch.stack([x, 2 * x])), torch.stack([layer(x), layer(2 * x)])
        )
        with pytest.raises(AdapterError, match=r"unfold_text\(\) first"):
            torch.func.grad(lambda x: layer(x).sum())(x)

    def test_forward_mode_and_tracing(self) -> None:
        layer, x = self.parts()
        with torch.autograd.forward_ad.dual_level():
            dual = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            assert torch.autograd.forward_ad.unpack_dual(dual).tangent is not None
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        torch.testing.assert_close(traced(2 * x), layer(2 * x))
