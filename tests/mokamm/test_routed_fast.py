"""The routed layer's fast path against its plain one and float64: outputs and every gradient; when it steps aside."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eval.speed.counting import saved_bytes
from mokamm.adapters import AdapterError, MokaConfig, RoutedLinear, set_routing
from mokamm.routing import Routing
from tests.mokamm.toy_routed import assert_close

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


@pytest.mark.parametrize("views", [["weight", "bias"], ["weight"], ["bias"]], ids=["weight and bias", "weight", "bias"])
def test_a_weight_that_is_no_parameter(views: list[str]) -> None:
    """Some wrappers put views of one flat tensor in the parameters' places."""
    routing, layer = routing_of(BATCHES["ragged"]), layer_of(nn.Linear(WIDTH, OUT))
    expected = run(layer, routing, True)
    for name in views:
        tensor = getattr(layer.base_layer, name).detach()
        delattr(layer.base_layer, name)
        setattr(layer.base_layer, name, tensor)
    layer.context.routing = routing
    x = torch.randn(3, 12, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x), expected["h"], rtol=0, atol=1e-12)
    layer.context.routing = Routing.text_only()
    step = layer.eval()(x[:, :1])
    layer.fold_text()
    torch.testing.assert_close(layer(x[:, :1]), step, rtol=0, atol=1e-12)


@pytest.mark.parametrize("hook", [False, True], ids=["one function", "by modules"])
def test_inputs_without_tokens_or_samples(hook: bool) -> None:
    layer = layer_of(nn.Linear(WIDTH, OUT))
    if hook:
        layer.base_layer.register_forward_hook(lambda *_: None)
    no_sample = Routing(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.bool))
    text = Routing.text_only()
    for routing, shape in ((no_sample, (0, 5)), (text, (0, 5)), (text, (2, 0)), (text, (0,))):
        layer.context.routing = routing
        x = torch.zeros(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
        h = layer(x)
        assert is_fast(h)
        assert h.shape == (*shape, OUT)
        h.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


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


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("hook", [False, True], ids=["one function", "by modules"])
def test_an_output_may_be_changed_in_place(hook: bool, bias: bool) -> None:
    layer, grads = layer_of(nn.Linear(WIDTH, OUT, bias=bias)), []
    layer.context.routing = routing_of(BATCHES["ragged"])
    if hook:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(3, 12, WIDTH, dtype=torch.float64, requires_grad=True)
    for change in (lambda h: h.mul_(2).add_(1), lambda h: h.mul(2).add(1)):
        h = layer(x)
        assert is_fast(h)
        grads.append(torch.autograd.grad(change(h).square().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("hook", [False, True], ids=["one function", "by modules"])
def test_backward_twice_and_what_is_refused(hook: bool) -> None:
    layer = layer_of()
    if hook:
        layer.base_layer.register_forward_hook(lambda *args: None)
    layer.context.routing = routing_of(BATCHES["ragged"])
    x = torch.randn(3, 12, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = layer(x).square().sum()
    once = torch.autograd.grad(loss, [x, layer.moka_A["default"].weight], retain_graph=True)
    again = torch.autograd.grad(loss, [x, layer.moka_A["default"].weight], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    alone = torch.autograd.grad(loss, [layer.moka_B["default"].weight], retain_graph=True)
    assert alone[0].any()
    for of in (x, layer.moka_B["default"].weight):
        (first,) = torch.autograd.grad(loss, [of], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward(retain_graph=True)


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


def test_autocast_leaves_float64_alone() -> None:
    routing, layer = routing_of(BATCHES["ragged"]), layer_of(nn.Linear(WIDTH, OUT))
    expected = run(layer, routing, True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(run(layer, routing, True), expected, 1e-12)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_plain_path_of_a_bfloat16_layer_stays_bfloat16(stored: torch.dtype) -> None:
    keys = torch.tensor([[False, True, False, True]])  # one is not text
    ids, x = torch.tensor([[0, 1, 2, 0]]), torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(4))
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        layer = layer_of(dtype=dtype)
        for factor in (layer.moka_A, layer.moka_B):
            factor.to(stored if dtype == torch.bfloat16 else dtype)
        layer.context.routing = Routing(ids, keys)
        h = layer(x.to(dtype).requires_grad_())
        assert not is_fast(h)
        assert h.dtype == dtype
        found[dtype] = h.double()
    assert (found[torch.bfloat16] - found[torch.float64]).norm() < 0.02 * found[torch.float64].norm()


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
