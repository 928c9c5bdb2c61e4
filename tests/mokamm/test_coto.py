"""CoTo and stochastic depth: the schedule, the draws, work that is really skipped, and whole trainings under them."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from data.collate import collate
from data.schema import UserError
from mokamm.adapters import METHODS, AdapterError, Coto, Routing, set_routing, wrap
from mokamm.adapters.coto import MEAN_SHARE, blocks_of, constant, rising
from mokamm.config import ConfigError, load_config
from mokamm.config_sections import AdapterConfig
from mokamm.names import DENSE, WITHOUT_ADAPTERS
from mokamm.training.stream import MicroBatches, plan
from mokamm.training.watch import read_metrics
from mokamm.weights import load_weights
from tests.mokamm.toy_lori import cut, random_b

ROOT = Path(__file__).resolve().parents[2]
OF_THE_FAMILY = {  # every method with adapters, and MokA's switches
    **{name: (name, {}) for name in METHODS if name not in WITHOUT_ADAPTERS},
    "moka without attention": ("moka", {"attention_weight": 0.0}),
    "moka, frozen A": ("moka", {"frozen_a": True}),
    "PEFT's hira": ("hira", {"one_matmul": False}),
}
EACH_KIND = ["lora", "moka", "dora", "hira"]


def llama(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def adapted(name: str, layers: int = 4) -> nn.Module:
    """A small LLM under a method, no weight of the adapter at zero."""
    method, options = OF_THE_FAMILY[name]
    model = wrap(llama(layers), method, ["text", "vision"], {"r": 3, "lora_alpha": 6, **options})
    if method in DENSE:  # a sparse B has nothing to train before its mask is set
        model.base_model.set_mask(cut(random_b(model)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    ids = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, -1]])
    set_routing(model, Routing(ids, ids == 0))
    return model


def embeddings() -> torch.Tensor:
    x = torch.randn(2, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x.requires_grad_()


# ---- schedule and draws --------------------------------------------------------------------------------------------


def test_probability_rises_in_a_straight_line_to_one_at_three_quarters():
    assert [rising(t, 100) for t in (0, 15, 30, 75, 99)] == pytest.approx([0.0, 0.2, 0.4, 1.0, 1.0])
    assert [rising(t, 200, p0=0.1, share=0.5) for t in (0, 50, 100, 199)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert rising(0, 0) == 1.0
    assert [constant(t) for t in (0, 5)] == [MEAN_SHARE] * 2
    mean = sum(rising(t, 10_000) for t in range(10_000)) / 10_000
    assert mean == pytest.approx(MEAN_SHARE, abs=1e-4)  # the control's default is CoTo's mean


def test_draws_have_their_probability_are_independent_and_never_leave_all_blocks_out():
    total = 3000
    coto = Coto(adapted("lora", layers=12), partial(rising, total_steps=total), seed=3)
    drawn = torch.tensor([coto.active(t) for t in range(total)])
    assert drawn.any(1).all()
    assert drawn[total * 3 // 4 :].all()
    assert float((~drawn).double().mean()) == pytest.approx(0.375, abs=0.012)
    for t in (450, 900, 1800):  # p = 0.2, 0.4, 0.8
        assert float(drawn[t - 150 : t + 150].double().mean()) == pytest.approx(rising(t, total), abs=0.04)
    half = torch.tensor([Coto.active(coto, t) for t in range(1050, 1200)]).double()
    assert (torch.corrcoef(half.T) - torch.eye(12)).abs().max() < 0.4
    alone = drawn[:60].sum(1) == 1
    assert len({tuple(row) for row in drawn[:60][alone].tolist()}) > 5  # where p is near 0, not always the same one


def test_draws_are_a_function_of_seed_and_step_alone():
    probability = partial(constant, p=0.5)
    one, other = Coto(adapted("lora"), probability, seed=5), Coto(adapted("moka"), probability, seed=5)
    torch.manual_seed(7)
    forwards = [one.active(t) for t in range(50)]
    torch.rand(10)
    assert [other.active(t) for t in reversed(range(50))] == forwards[::-1]
    third = Coto(adapted("lora"), probability, seed=6)
    assert forwards != [third.active(t) for t in range(50)]
    first = ["".join("01"[acts] for acts in drawn) for drawn in forwards[:6]]
    assert " ".join(first) == "1111 1010 1101 0011 0001 1011"  # so a run goes on under another Python


def test_blocks_are_found_by_their_names():
    found = blocks_of(adapted("lora"))
    assert {name: len(layers) for name, layers in found.items()} == {
        f"base_model.model.model.layers.{i}": 7 for i in range(4)
    }
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    found = blocks_of(wrap(gpt, "lora", ["text"], {"r": 2, "target_modules": ["c_attn", "c_proj", "lm_head"]}))
    assert {name: len(layers) for name, layers in found.items()} == {
        "base_model.model.transformer.h.0": 3, "base_model.model.transformer.h.1": 3, "": 1,
    }  # fmt: skip


def test_a_model_without_adapters_is_refused():
    with pytest.raises(AdapterError, match="this model has none"):
        Coto(wrap(llama(), "full", ["text"], {}), constant)
    assert Coto(wrap(llama(), "full", ["text"], {}), None).blocks == {}


# ---- a step --------------------------------------------------------------------------------------------------------


def flops(model: nn.Module, coto: Coto | None = None, step: int = 0) -> int:
    with FlopCounterMode(display=False) as counter:
        if coto is None:
            model(inputs_embeds=embeddings()).logits.sum().backward()
        else:
            with coto.step(step):
                coto.attached(model(inputs_embeds=embeddings()).logits.sum()).backward()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def base_flops() -> int:
    return flops(wrap(llama(), "none", ["text"], {}))


@pytest.mark.parametrize("name", OF_THE_FAMILY)
def test_what_sits_out_costs_nothing_forward_and_backward(name, base_flops):
    model = adapted(name)
    coto, whole = Coto(model, partial(constant, p=0.4)), flops(model)
    for acting in (1, 3):
        step = next(t for t in range(100) if sum(coto.active(t)) == acting)
        assert (flops(model, coto, step) - base_flops) * 4 == (whole - base_flops) * acting


@pytest.mark.parametrize("name", OF_THE_FAMILY)
def test_what_sits_out_has_zero_gradients_stays_trainable_and_acts_again_afterwards(name):
    model = adapted(name)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = model(inputs_embeds=embeddings()).logits
    coto = Coto(model, partial(constant, p=0.4))
    acts = dict(zip(coto.blocks, coto.active(0), strict=True))
    assert 0 < sum(acts.values()) < 4
    sitting_out = {n for n in trained if any(n.startswith(block + ".") for block in acts if not acts[block])}
    with coto.step(0):
        idle = {id(parameter) for parameter in coto.idle}  # these alone: ZeRO-3 makes each of them whole
        assert {n for n, p in model.named_parameters() if id(p) in idle} == sitting_out
        loss = model(inputs_embeds=embeddings()).logits.square().sum()
        attached = coto.attached(loss)
        assert torch.equal(attached, loss)
        attached.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained
    for n, parameter in model.named_parameters():
        if n in trained:
            assert bool(parameter.grad.any()) == (n not in sitting_out) or "moka_A" in n, n
            assert n not in sitting_out or not parameter.grad.any()
    assert torch.equal(model(inputs_embeds=embeddings()).logits, before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_all_adapters_act_again_after_an_error():
    model = adapted("lora")
    before = model(inputs_embeds=embeddings()).logits
    coto = Coto(model, partial(constant, p=0.4))

    def fail() -> None:
        with coto.step(0):
            assert not torch.equal(model(inputs_embeds=embeddings()).logits, before)
            raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        fail()
    assert torch.equal(model(inputs_embeds=embeddings()).logits, before)


@pytest.mark.parametrize("name", ["lora", "hira", "moka"])
@pytest.mark.filterwarnings("ignore:The model contains some adapter layers that are enabled")
def test_the_draw_holds_to_the_end_of_the_step_and_the_user_s_switch_is_left_alone(name):
    model = adapted(name)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}

    def output() -> torch.Tensor:
        return model(inputs_embeds=embeddings()).logits

    with model.disable_adapter():
        base = output()
    whole, coto = output(), Coto(model, partial(constant, p=0.4))
    with coto.step(0):
        drawn = output()
        with model.disable_adapter():  # such as for a penalty on the distance to the base
            assert torch.equal(output(), base)
        assert torch.equal(output(), drawn)
    assert not torch.equal(drawn, base)
    assert not torch.equal(drawn, whole)
    assert torch.equal(output(), whole)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    with model.disable_adapter():
        with coto.step(0):
            assert torch.equal(output(), base)
        assert torch.equal(output(), base)
    with coto.step(0):
        model.base_model.disable_adapter_layers()
    assert torch.equal(output(), base)


# ---- trainings -----------------------------------------------------------------------------------------------------


def gated(model: nn.Module, coto: Coto) -> dict[str, float]:
    """Gates on all adapters by hand: what a layer adds to its base layer's output is multiplied by its block's."""
    gates = dict.fromkeys(coto.blocks, 1.0)
    for block, layers in coto.blocks.items():
        for layer in layers:

            def hook(module, inputs, output, block=block):
                base = module.base_layer(*inputs)
                return base + gates[block] * (output - base)

            layer.register_forward_hook(hook)
    return gates


@pytest.mark.parametrize("method", EACH_KIND)
def test_training_is_that_of_a_plain_loop_with_gates_in_float64(toy, tmp_path, method):
    seed = 1  # its draws leave a block out in four of six steps
    options = {"max_grad_norm": 0.5, "weight_decay": 0.1, "max_steps": 6, "seed": seed, **toy.FROM_STEP_ONE}
    adapter = {"method": method, "coto": {"p0": 0.1}}
    trained, _ = toy.run(tmp_path, toy.alone(), method=method, adapter=adapter, dtype=torch.float64, **options)

    model = toy.build(method, seed=seed).double()
    dataset = toy.corpus(tmp_path).train
    coto = Coto(model.llm, partial(rising, total_steps=6, p0=0.1), seed=seed)
    gates = gated(model.llm, coto)
    rates = {"projector": 1e-3, "adapter": 1e-2}
    parameters = [(p, rates[part]) for part, named in toy.parts_of(model).items() for _, p in named]
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": rate, "weight_decay": 0.1 * (p.dim() > 1)} for p, rate in parameters]
    )
    rows = iter(MicroBatches(plan(len(dataset), 2, 2, 1, 1.0, 6), seed, rank=0))
    losses, some = [], 0
    for step in range(6):
        active = coto.active(step)
        some += not all(active)
        gates.update(zip(coto.blocks, map(float, active), strict=True))
        batch = collate([dataset[i] for _ in range(2) for i in next(rows)], 0)
        found = model(batch)
        loss = found["loss_sum"] / found["tokens"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p, _ in parameters], 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert some == 4
    assert toy.losses(tmp_path) == pytest.approx(losses, rel=1e-9)
    for (name, a), (_, b) in zip(trained.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("method", ["moka", "hira"])
def test_accumulation_and_checkpointing_leave_losses_alone(toy, tmp_path, method):
    run = partial(toy.run, ranks=toy.alone(), method=method, adapter={"method": method, "coto": True}, max_steps=4)
    run = partial(run, dtype=torch.float64, **toy.FROM_STEP_ONE)
    run(tmp_path / "a", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    run(tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    run(tmp_path / "c", gradient_checkpointing=True)
    plain = partial(toy.run, ranks=toy.alone(), method=method, max_steps=4, dtype=torch.float64, **toy.FROM_STEP_ONE)
    plain(tmp_path / "without")
    losses = toy.losses(tmp_path / "a")
    assert toy.losses(tmp_path / "b") == pytest.approx(losses, rel=1e-9)
    assert toy.losses(tmp_path / "c") == pytest.approx(losses, rel=1e-9)
    assert toy.losses(tmp_path / "without")[1:] != pytest.approx(losses[1:], rel=1e-6)


@pytest.mark.parametrize("adapter", [{"coto": True}, {"stochastic_depth": {"p": 0.5}}])
def test_a_resumed_run_is_bit_identical(toy, tmp_path, adapter):
    run = partial(toy.run, ranks=toy.alone(), dropout=0.1, adapter=adapter, **toy.FROM_STEP_ONE)
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "halves", stop_after=6)
    halves, _ = run(tmp_path / "halves")  # from step 4
    assert toy.losses(tmp_path / "halves") == toy.losses(tmp_path / "whole")
    for (name, a), (_, b) in zip(whole.named_parameters(), halves.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match="adapter"):
        toy.run(tmp_path / "halves", toy.alone(), dropout=0.1, **toy.FROM_STEP_ONE)


def test_validation_and_checkpoints_see_every_adapter(toy, tmp_path):
    toy.run(tmp_path, toy.alone(), adapter={"coto": True}, eval_steps=2, save_steps=2, **toy.FROM_STEP_ONE)
    validations = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "validation"]
    model = toy.build(seed=9)
    model.llm.get_base_model().load_state_dict(toy.build(seed=0).llm.get_base_model().state_dict())
    load_weights(model, tmp_path / "checkpoint-4")
    corpus = toy.corpus(tmp_path / "again")
    with torch.no_grad():
        batch = collate([corpus.validation[i] for i in range(5)], 0)
        found = model.eval()(batch)
    expected = float(found["loss_sum"] / found["tokens"])
    assert next(r for r in validations if r["step"] == 4)["loss"] == pytest.approx(expected, rel=1e-5)


# ---- configuration -------------------------------------------------------------------------------------------------


def test_true_is_the_source_and_false_is_off():
    assert AdapterConfig(coto=True).coto.model_dump() == {"p0": 0.0, "share": 0.75}
    assert AdapterConfig(stochastic_depth=True).stochastic_depth.p == MEAN_SHARE
    assert AdapterConfig(coto=False).coto is None
    assert AdapterConfig.model_validate(AdapterConfig(coto=True).model_dump()).coto == AdapterConfig(coto=True).coto


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["adapter.method=full", "adapter.coto=true"], "method 'full' has none; choose one of moka"),
        (["adapter.method=none", "adapter.stochastic_depth=true"], "stochastic_depth lets adapters sit out"),
        (["adapter.coto.p0=1.0"], "adapter.coto.p0"),
        (["adapter.coto.p0=-0.1"], "adapter.coto.p0"),
        (["adapter.coto.share=0"], "adapter.coto.share"),
        (["adapter.stochastic_depth.p=0"], "adapter.stochastic_depth.p"),
        (["adapter.coto=perhaps"], "found 'perhaps'"),
        (["adapter.coto.p=0.3"], "unknown key 'p'; did you mean 'p0'?"),
        (["adapter.coto=true", "adapter.stochastic_depth=true"], "both set"),
    ],
)
def test_what_is_refused(overrides, expected):
    with pytest.raises(ConfigError) as error:
        load_config(ROOT / "configs/quickstart.yaml", overrides)
    assert expected in str(error.value)


def test_it_is_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom mokamm.config import ConfigError, load_config\n"
        "try:\n    load_config('configs/quickstart.yaml', ['adapter.method=full', 'adapter.coto=true'])\n"
        "except ConfigError:\n    sys.exit(3 if 'torch' not in sys.modules else 4)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 3
