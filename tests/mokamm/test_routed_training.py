"""Gradients of the routed layer: against PEFT's LoRA, under checkpointing, in bf16; its kernels and waits counted."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from mokamm.adapters import MokaConfig
from mokamm.routing import AdapterError, Routing

IDS = torch.tensor([[0, 1, 1, 2, 0, 0, 0, -1], [1, 1, 0, 0, 2, 2, 0, 0]])
KEYS = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 1, 0]]).bool()
OTHER = torch.tensor([[2, 2, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, -1, -1]])


def small_llm(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def wrapped(llm: nn.Module, **options: object) -> nn.Module:
    model = get_peft_model(llm, MokaConfig(**{"r": 3, "lora_alpha": 5, **options}))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "moka_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.3
    return model


def embeddings(seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 8, 16, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, routing: Routing, seed: int = 2) -> Tensor:
    model.base_model.set_routing(routing)
    logits = model(inputs_embeds=embeddings(seed).requires_grad_(), use_cache=False).logits
    return logits.float().logsumexp(-1).double().square().mean() + logits[..., 3].sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_text_only_is_pefts_lora() -> None:
    """Equal logits, equal gradients, and none for the other modalities."""
    lora = get_peft_model(small_llm(), LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    moka = wrapped(small_llm())
    twins = dict(lora.named_parameters())
    for name, parameter in moka.named_parameters():
        if "moka_A" in name:
            twins[name.replace("moka_", "lora_")].data = parameter.data[:3].clone()
        elif "moka_B" in name:
            twins[name.replace("moka_", "lora_")].data = parameter.data.clone()
    outputs = []
    for model, routing in [(moka, Routing.text_only()), (moka, Routing(IDS * 0, KEYS)), (lora, None)]:
        model.zero_grad()
        if routing is not None:
            model.base_model.set_routing(routing)
        logits = model(inputs_embeds=embeddings(), use_cache=False).logits
        logits.square().sum().backward()
        outputs.append((logits.detach(), gradients(model)))
    assert len(outputs[2][1]) == 28
    for logits, grads in outputs[:2]:
        torch.testing.assert_close(logits, outputs[2][0], rtol=0, atol=1e-10)
        for name, grad in grads.items():
            expected = outputs[2][1][name.replace("moka_", "lora_")]
            torch.testing.assert_close(grad[: len(expected)], expected, rtol=1e-10, atol=1e-10)
            assert not grad[len(expected) :].any()


def test_gradients_are_the_derivatives() -> None:
    model = wrapped(nn.ModuleDict({"proj": nn.Linear(4, 5)}).double(), target_modules=["proj"], scale_logits=False)
    layer = model.base_model.model["proj"]
    model.base_model.set_routing(Routing(IDS, KEYS))
    A, B = layer.moka_A["default"].weight, layer.moka_B["default"].weight

    def h(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        parameters = {"moka_A.default.weight": a, "moka_B.default.weight": b}
        return torch.func.functional_call(layer, parameters, (x,))

    x = torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(h, (x, A, B))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = wrapped(small_llm(), lora_dropout=0.2).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.base_model.model.is_gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        loss = loss_of(model, Routing(IDS, KEYS))
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert len(results[0][1]) == len(results[1][1]) == 28
    for name, grad in results[0][1].items():
        assert grad.any(), name
        torch.testing.assert_close(results[1][1][name], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_two_forwards_before_one_backward(enable: str) -> None:
    """Each is recomputed under the routing that it was run with (non-reentrant)."""
    model = wrapped(small_llm()).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, enable)()
        model.zero_grad()
        total = loss_of(model, Routing(IDS, KEYS), 2) + loss_of(model, Routing(OTHER, KEYS), 3)
        total.backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointing_enabled_before_wrapping(offload: bool) -> None:
    """Each forward is recomputed under its own routing all the same, and what was set beside stays."""
    results = []
    for enabled in (False, True):
        llm = small_llm()
        if enabled:
            settings = {"use_reentrant": False, "determinism_check": "none"}
            llm.activation_checkpointing_enable(settings, offload=offload)
        model = wrapped(llm).train()
        total = loss_of(model, Routing(IDS, KEYS), 2) + loss_of(model, Routing(OTHER, KEYS), 3)
        total.backward()
        results.append(gradients(model))
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=0, atol=1e-12)
    kept = llm.model.layers[0]._gradient_checkpointing_func.keywords
    assert kept == {**settings, "context_fn": model.base_model.context.checkpoint_contexts}


def test_an_llm_that_is_wrapped_again_is_recomputed_under_its_new_routing() -> None:
    llm = small_llm()
    llm.activation_checkpointing_enable({"use_reentrant": False})
    again = wrapped(wrapped(llm).unload()).train()
    contexts = {vars(m)["_gradient_checkpointing_func"].keywords["context_fn"].__self__ for m in llm.model.layers}
    assert contexts == {again.base_model.context}


def test_reentrant_checkpointing_and_a_context_of_the_users_stay_as_they_were_enabled() -> None:
    def contexts() -> tuple:
        return nullcontext(), nullcontext()

    for settings in ({"use_reentrant": True}, {"use_reentrant": False, "context_fn": contexts}):
        llm = small_llm()
        llm.activation_checkpointing_enable(settings)
        wrapped(llm)
        assert llm.model.layers[0]._gradient_checkpointing_func.keywords == settings


def test_checkpointing_on_an_older_transformers() -> None:
    class Older(nn.Module):
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict) -> None:
            self.given = gradient_checkpointing_kwargs

    tuner = wrapped(small_llm()).base_model
    tuner.model = Older()
    tuner.activation_checkpointing_enable({"use_reentrant": False})
    assert tuner.model.given == {"use_reentrant": False, "context_fn": tuner.context.checkpoint_contexts}


def test_dropout_acts_on_the_adapters_input_in_training_only() -> None:
    model = wrapped(nn.ModuleDict({"proj": nn.Linear(4, 5)}).double(), target_modules=["proj"], lora_dropout=0.5)
    layer, x = model.base_model.model["proj"], torch.ones(2, 8, 4, dtype=torch.float64)
    model.base_model.set_routing(Routing.text_only())
    expected = layer.base_layer(x) + 5 / 3 * (
        nn.functional.linear(x, layer.moka_B["default"].weight @ layer.moka_A["default"].weight[:3])
    )
    assert not torch.allclose(layer.train()(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)


class Operations(TorchDispatchMode):
    """Counts every operator that reaches the backend."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


VIEWS = {
    "view",
    "_unsafe_view",
    "expand",
    "t",
    "transpose",
    "unsqueeze",
    "slice",
    "select",
    "detach",
    "alias",
    "as_strided",
}


def operations(model: nn.Module, repeat: int, backward: bool) -> Counter[str]:
    """Kernels (views left out) of the adapter of one Linear, on a batch of 2 * repeat rows."""
    ids, keys = IDS.repeat(repeat, 1), KEYS.repeat(repeat, 1)
    routing = Routing(ids, keys)
    model.base_model.set_routing(routing)
    layer = model.base_model.model["proj"]
    x = torch.randn(len(ids), 8, 4, requires_grad=True)
    layer(x)  # what is computed once per batch is there now
    model.zero_grad()
    with Operations() as seen:
        h = layer(x)
        if backward:
            h.sum().backward()
    return Counter({name.split("::")[1]: n for name, n in seen.counts.items() if name.split("::")[1] not in VIEWS})


@pytest.mark.parametrize("shared_b", [True, False])
def test_kernels_do_not_depend_on_the_batch_and_none_waits(shared_b: bool) -> None:
    model = wrapped(nn.ModuleDict({"proj": nn.Linear(4, 5)}), target_modules=["proj"], shared_b=shared_b)
    for backward in (False, True):
        one, four = operations(model, 1, backward), operations(model, 4, backward)
        assert one == four
        assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_to_copy"} & set(one)
        if not backward:
            assert sum(one.values()) <= 13, one
            assert sum(n for name, n in one.items() if "mm" in name or name == "linear") <= 5, one


@pytest.mark.parametrize("adapter", ["float32 adapter", "bfloat16 adapter", "autocast"])
def test_bfloat16_stays_close_to_float64(adapter: str) -> None:
    options = {"r": 4, "lora_alpha": 4}
    exact = wrapped(small_llm(), **options).eval()
    base = torch.float32 if adapter == "autocast" else torch.bfloat16
    model = wrapped(small_llm().to(base), **options).eval()
    if adapter == "bfloat16 adapter":
        model.to(torch.bfloat16)
    dtype = {p.dtype for name, p in model.named_parameters() if "moka_" in name}
    assert dtype == {torch.bfloat16 if adapter == "bfloat16 adapter" else torch.float32}
    for module in (exact, model):
        module.base_model.set_routing(Routing(IDS, KEYS))
    name = "base_model.model.model.layers.1.mlp.up_proj"
    x = embeddings()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=adapter == "autocast"):
        h = model.get_submodule(name)(x.to(base))
    expected = exact.get_submodule(name)(x).detach()
    assert (h.double() - expected).norm() / expected.norm() < 2e-2
    logits = model(inputs_embeds=x.to(base)).logits
    logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_forward_without_its_routing_is_refused() -> None:
    model = wrapped(small_llm())
    with pytest.raises(AdapterError, match="no routing"):
        model(inputs_embeds=embeddings())
    model.base_model.set_routing(Routing(IDS[:, :-1], KEYS[:, :-1]))
    with pytest.raises(AdapterError, match=r"\(2, 7\)"):
        model(inputs_embeds=embeddings())
    with pytest.raises(AdapterError, match="holds 3"):
        model.base_model.set_routing(Routing(IDS + 1, KEYS))
    with pytest.raises(AdapterError, match="expects a Routing"):
        model.base_model.set_routing(IDS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_agrees_and_never_waits() -> None:
    model = wrapped(small_llm()).eval()
    model.base_model.set_routing(Routing(IDS, KEYS))
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings()).logits
        model.cuda()
        layer, x = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj"), embeddings().cuda()
        torch.testing.assert_close(model(inputs_embeds=x).logits.cpu(), expected, rtol=0, atol=1e-9)
    routing = Routing(IDS, KEYS).to("cuda")
    model.base_model.set_routing(routing)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x.requires_grad_()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_routing_built_on_cuda_knows_what_one_from_the_cpu_does() -> None:
    there, here = Routing(IDS.cuda(), KEYS.cuda()), Routing(IDS, KEYS)
    for name in ("max_id", "keys_are_text", "may_be_padded"):
        assert getattr(there, name) == getattr(here, name)
    for name in ("modality_ids", "key_mask", "key_index", "key_valid"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
        assert getattr(there, name).is_cuda
    with pytest.raises(AdapterError, match="modality_ids holds -2"):
        Routing(IDS.cuda() * 0 - 2, KEYS.cuda())
