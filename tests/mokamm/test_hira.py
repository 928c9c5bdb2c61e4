"""HiRA and DoRA: the one-matmul layer against PEFT's own, what it costs, its files; DoRA as PEFT has it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.hira.layer import Linear as PeftHira
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from mokamm.adapters import AdapterError, target_report, wrap
from mokamm.adapters.hira import ModifiedMatmul, OneMatmulHira, use_one_matmul

OUT, IN, R = 12, 20, 3


class Linears(nn.Module):
    """One linear module that PEFT can wrap."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def twins(dtype: torch.dtype, linear: nn.Module | None = None, adapters: int = 1, dropout: float = 0.0):
    """PEFT's HiRA on one Linear, and a copy with ours; no factor is zero."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT) if linear is None else linear
    config = HiraConfig(r=R, target_modules=["linear"], hira_dropout=dropout)
    peft = get_peft_model(Linears(linear).to(dtype), config, autocast_adapter_dtype=False)
    for i in range(1, adapters):
        peft.add_adapter(f"more{i}", copy.deepcopy(config), autocast_adapter_dtype=False)
    peft.base_model.set_adapter(["default", *(f"more{i}" for i in range(1, adapters))])
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "hira_" in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)  # the same in every dtype
    return peft, use_one_matmul(copy.deepcopy(peft))


def results(model: nn.Module, dtype: torch.dtype, shape: tuple[int, ...] = (2, 7)) -> list[Tensor]:
    """Output, and the gradients of input and factors."""
    x = torch.randn(*shape, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    trained = [p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad]
    assert len(trained) >= 2
    return [y.detach(), x.grad, *trained]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", ["bias", "no bias", "two adapters", "one token", "vector"])
def test_it_is_pefts_layer(dtype, tolerance, case):
    linear = nn.Linear(IN, OUT, bias=case != "no bias")
    peft, ours = twins(dtype, linear, adapters=2 if case == "two adapters" else 1)
    assert type(peft.base_model.model.linear) is PeftHira
    assert type(ours.base_model.model.linear) is OneMatmulHira
    shape = {"one token": (2, 1), "vector": ()}.get(case, (2, 7))
    for expected, found in zip(results(peft, dtype, shape), results(ours, dtype, shape), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, weight, B, A = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 4, IN), (OUT, IN), (OUT, R), (R, IN))
    )  # fmt: skip
    inputs = [t.requires_grad_() for t in (x, B, A)]
    assert torch.autograd.gradcheck(lambda x, B, A: ModifiedMatmul.apply(x, weight, B, A), inputs)


def test_half_precision_is_as_exact_as_pefts():
    """In bfloat16, stored or under autocast: output and gradients, against float64."""
    exact = results(twins(torch.float64)[0], torch.float64)
    for weights, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = [results(model, torch.float32 if autocast else weights) for model in twins(weights)]
        for reference, peft, ours in zip(exact, *found, strict=True):
            assert ours.dtype == peft.dtype
            errors = [float((t.double() - reference).norm() / reference.norm()) for t in (peft, ours)]
            assert errors[1] < 1.5 * errors[0] < 0.01


def test_a_float32_adapter_on_bfloat16_and_backward_outside_autocast():
    """As PEFT loads a bfloat16 LLM, and as a loop trains under autocast: the factors' gradients are float32."""
    exact = results(twins(torch.float64)[0], torch.float64)
    for weights, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        _, ours = twins(weights)
        for name, parameter in ours.named_parameters():
            if "hira_" in name:
                parameter.data = parameter.data.float()
        x = torch.randn(2, 7, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = ours(x.requires_grad_())
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        trained = [p.grad for _, p in sorted(ours.named_parameters()) if p.requires_grad]
        assert {grad.dtype for grad in trained} == {torch.float32}
        for reference, found in zip(exact, [y.detach(), x.grad, *trained], strict=True):
            assert float((found.double() - reference).norm() / reference.norm()) < 0.02


def test_autocast_rounds_the_changed_weight_once():
    _, ours = twins(torch.float32)
    layer, x = ours.base_model.model.linear, torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
    base, change = layer.base_layer, layer.hira_B["default"] @ layer.hira_A["default"]
    expected = x.bfloat16() @ (base.weight + base.weight * change).bfloat16().T + base.bias.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), expected)


def test_a_layer_without_the_active_adapter_is_the_base_layer():
    peft = get_peft_model(
        nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN)).double(), HiraConfig(target_modules=["0"])
    )
    peft.add_adapter("other", HiraConfig(target_modules=["1"]))
    peft.set_adapter("other")
    ours, x = use_one_matmul(copy.deepcopy(peft)), torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(ours(x), peft(x))
    with torch.no_grad():
        peft.base_model.model[1].hira_B["other"].fill_(0.1)
    assert not torch.allclose(ours(x), peft(x))


def test_disabled_and_merged_are_pefts():
    peft, ours = twins(torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64)
    for one, other in ((peft, ours), (ours, peft)):
        with one.disable_adapter():
            assert torch.equal(one(x), other.base_model.model.linear.base_layer(x))
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), peft(x))
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), peft(x))


def test_where_one_matmul_does_not_say_it_pefts_forward_does():
    peft, ours = twins(torch.float64, dropout=0.5)
    found = []
    for model in (peft, ours):
        torch.manual_seed(3)
        found.append(results(model.train(), torch.float64))
    for expected, got in zip(*found, strict=True):
        assert torch.equal(expected, got)
    with FlopCounterMode(display=False) as counter:  # nothing is dropped in eval: one matmul, and B A
        found = ours.eval()(torch.ones(1, IN, dtype=torch.float64))
    assert counter.get_total_flops() == 2 * OUT * IN * (1 + R)
    torch.testing.assert_close(found, peft.eval()(torch.ones(1, IN).double()))
    transposed = [results(model, torch.float64) for model in twins(torch.float64, Conv1D(OUT, IN))]
    trained = twins(torch.float64)
    for model in trained:
        model.base_model.model.linear.base_layer.weight.requires_grad_()
    for expected, got in (
        *zip(*transposed, strict=True),
        *zip(*(results(m, torch.float64) for m in trained), strict=True),
    ):
        torch.testing.assert_close(got, expected)


def test_three_matmuls_instead_of_five_and_nothing_kept_but_the_input():
    width, places = 64, 256
    flops, kept = [], []
    for model in twins(torch.float32, nn.Linear(width, width, bias=False)):
        x = torch.randn(places, width, requires_grad=True)
        saved: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}

        def keep(tensor: Tensor, saved: dict[int, int] = saved, weights: set[int] = weights) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda t: t):
            model(x).sum().backward()
        flops.append(counter.get_total_flops())
        kept.append(sum(saved.values()))
    matmul, small = 2 * places * width * width, 2 * width * width * R
    assert flops == [5 * matmul + 3 * small, 3 * matmul + 4 * small]  # B A is made twice
    assert kept[0] >= 4 * width * width
    assert kept[1] == 0


# ---- as a method ---------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 13).view(2, 6)).logits


def randomise(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


TARGETS, LEFT_OUT = ["q_proj", "down_proj"], ["layers.1.self_attn.q_proj"]
OPTIONS = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": TARGETS}


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_a_saved_adapter_loads_with_plain_peft(method, tmp_path):
    model = randomise(wrap(llama(), method, ["vision"], OPTIONS))
    assert target_report(model) == {"q_proj": 2, "down_proj": 2}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert not any(isinstance(module, OneMatmulHira) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(llama()), atol=1e-4)


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_the_options_are_those_of_pefts_config(method):
    model = wrap(llama(), method, ["vision"], {**OPTIONS, "exclude_modules": LEFT_OUT, "one_matmul": False})
    own = (
        HiraConfig(r=3, hira_dropout=0.1, target_modules=TARGETS, exclude_modules=LEFT_OUT)
        if method == "hira"
        else LoraConfig(
            r=3, lora_alpha=6, lora_dropout=0.1, use_dora=True, target_modules=TARGETS, exclude_modules=LEFT_OUT
        )
    )
    peft = get_peft_model(llama(), own)
    shapes = [{name: p.shape for name, p in m.named_parameters() if p.requires_grad} for m in (model, peft)]
    assert shapes[0] == shapes[1]
    torch.manual_seed(5)
    state = {name: torch.randn_like(p) for name, p in peft.named_parameters() if p.requires_grad}
    found = []
    for m in (model, peft):
        m.load_state_dict(state, strict=False)
        torch.manual_seed(6)
        found.append(m.train()(input_ids=torch.arange(1, 13).view(2, 6)).logits)  # the same dropout
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_names_and_ranges_are_checked_as_for_lora(method):
    for options, message in (
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"r": 0}, "r must be"),
        ({"lora_dropout": 1.0}, "lora_dropout must be"),
        ({"one_matmull": True}, "did you mean 'one_matmul'"),
    ):
        with pytest.raises(AdapterError, match=message):
            wrap(llama(), method, ["vision"], options)


def test_gpt_2_keeps_pefts_forward():
    model = wrap(GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2)), "hira", ["text"], {"r": 2})
    assert torch.isfinite(logits(randomise(model))).all()


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_they_train_and_go_on_bit_identically(toy, tmp_path, method):
    adapter = {"method": method}
    whole, _ = toy.run(tmp_path / "whole", toy.alone(), method=method, adapter=adapter, **toy.FROM_STEP_ONE)
    toy.run(tmp_path / "halves", toy.alone(), method=method, adapter=adapter, stop_after=6, **toy.FROM_STEP_ONE)
    halves, _ = toy.run(tmp_path / "halves", toy.alone(), method=method, adapter=adapter, **toy.FROM_STEP_ONE)
    losses = toy.losses(tmp_path / "whole")
    assert losses[-1] < losses[0]
    assert toy.losses(tmp_path / "halves") == losses
    for (name, a), (_, b) in zip(whole.named_parameters(), halves.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_hooks_and_torch_func_take_pefts_path() -> None:
    peft, ours = twins(torch.float64)
    x = torch.randn(2, 7, IN, dtype=torch.float64)
    layer, calls = ours.base_model.model.linear, []
    handle = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(ours(x), peft(x))
    assert calls == [1]
    handle.remove()
    found, wanted = (torch.func.grad(lambda x, m=model: m(x).square().sum())(x) for model in (ours, peft))
    torch.testing.assert_close(found, wanted)
