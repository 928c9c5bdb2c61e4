"""LoRI-D and LoRI-S as adapters: numbers against dense masked LoRA, and everything that PEFT does with them."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from mokamm.adapter_folder import AdapterFolder
from mokamm.adapters import AdapterError, LoriConfig, MokaConfig, wrap
from mokamm.adapters.frozen_a import draw
from mokamm.adapters.masks import Mask, keep_top, pack
from mokamm.adapters.sparse_b import SparseB
from mokamm.adapters.start import Source, a_digest, adopt_a, factors, start_b
from mokamm.weights import load_adapter
from tests.mokamm.toy_lori import (
    IDS,
    OPTIONS,
    cut,
    dense_twin,
    kept,
    logits,
    lori_s,
    random_b,
    small_llm,
)

# ---- LoRI-D ----------------------------------------------------------------------------------------------------------


def test_lori_d_is_plain_lora_with_a_frozen(tmp_path: Path) -> None:
    model = wrap(small_llm(), "lori_d", ["text", "vision"], {**OPTIONS, "a_seed": 3})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 14
    assert all(".lora_B." in name for name in trained)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert torch.equal(layer.lora_A["default"].weight.float(), draw("model.layers.0.mlp.up_proj", (4, 16), 3))
    for _, B in factors(model).values():
        nn.init.normal_(B.weight)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # plain PEFT reads it without a word
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        again = PeftModel.from_pretrained(small_llm(), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=0, atol=1e-12)


# ---- LoRI-S against dense masked LoRA --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lori_s", "lori_moka_s"])
def test_outputs_and_gradients_are_those_of_a_dense_masked_b(method: str) -> None:
    model, mask = lori_s(method)
    twin = dense_twin(model, method)
    assert not torch.allclose(logits(model), small_llm()(input_ids=IDS).logits)
    for one in (model, twin):
        logits(one).square().sum().backward()
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-10, atol=1e-10)
    values = 0
    for name, (A, B) in factors(twin).items():
        where, own = kept(mask, name), factors(model)[name][1]
        assert A.weight.grad is None
        if own.values is not None:
            torch.testing.assert_close(own.values.grad, B.weight.grad[where], rtol=1e-10, atol=1e-10)
            values += own.values.numel()
    assert values == mask.kept == round(0.2 * mask.total)
    assert model.get_nb_trainable_parameters()[0] == mask.kept


def test_a_product_by_hand() -> None:
    """Every entry by loops, with frozen entries beside the trained ones; gradients by finite differences."""
    torch.manual_seed(0)
    B = SparseB(3, 5).double()
    dense = torch.randn(5, 3, dtype=torch.float64)
    dense[1] = 0.0
    where = torch.rand(5, 3) < 0.4
    with pytest.raises(AdapterError, match="and a mask that is set"):
        B.start(dense)
    for damaged in ([1, 128], [1], [1, 1, 1], []):  # bytes for 15 entries: the last bit stands for none
        with pytest.raises(AdapterError, match=r"B: its mask .* is not one of a B of shape \(5, 3\)"):
            B.set_mask(torch.tensor(damaged, dtype=torch.uint8))
    B.set_mask(pack(where))
    with pytest.raises(AdapterError, match=r"B is \(3, 5\), expected \(5, 3\)"):
        B.start(dense.T)
    B.start(dense)
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.tensor(
        [
            [[sum(z[b, t, r].item() * dense[d, r].item() for r in range(3)) for d in range(5)] for t in range(4)]
            for b in range(2)
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(B(z), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(B.dense(), dense)
    assert not B.dense().requires_grad
    assert B.values is not None
    assert B.values.numel() == int(where.sum())
    assert set(B.state_dict()) == {"values", "shape", "mask", "frozen_mask", "frozen_values"}  # no positions
    assert B.frozen_values is not None
    assert B.frozen_values.numel() == int((~where & (dense != 0)).sum())  # a zero outside of the mask takes no room

    def function(z: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(B, {"values": values}, (z,))

    assert torch.autograd.gradcheck(function, (z, B.values.detach().clone().requires_grad_()))

    none = SparseB(3, 5).double()  # as a mask over all layers may leave some
    none.set_mask(pack(torch.zeros(5, 3, dtype=torch.bool)))
    assert torch.equal(none(z), z.new_zeros(2, 4, 5))
    none.start(dense)
    assert not [*none.parameters()]
    torch.testing.assert_close(none(z), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(none.dense(), dense)  # in the dtype of the frozen entries
    none.set_mask(pack(where))  # another mask, under which entries train
    assert [p.requires_grad for p in none.parameters()] == [True]
    none.start(dense * where)  # and another beginning, which leaves nothing of the first one
    torch.testing.assert_close(none.dense().double(), dense * where, rtol=1e-6, atol=0)


def test_damaged_frozen_entries_are_refused() -> None:
    B, frozen = SparseB(3, 5), torch.zeros(5, 3, dtype=torch.bool)
    frozen[0], values = True, torch.ones(3)
    with pytest.raises(AdapterError, match="b: its mask of frozen entries and their number disagree"):
        B.set_frozen(pack(frozen), values[:2], "b")
    for damaged in (
        pack(frozen)[:1],
        torch.tensor([3, 128], dtype=torch.uint8),
    ):  # too short; a bit that stands for none
        with pytest.raises(AdapterError, match=r"b: its mask .* is not one of a B of shape \(5, 3\)"):
            B.set_frozen(damaged, values, "b")
    B.set_frozen(pack(frozen), values, "b")
    assert torch.equal(B.dense(), frozen.float())


def test_a_backward_pass_outside_of_autocast_takes_the_inputs_own_dtypes() -> None:
    torch.manual_seed(0)
    B, dense, z = SparseB(3, 5), torch.randn(5, 3), torch.randn(2, 4, 3, requires_grad=True)
    B.set_mask(pack(torch.ones(5, 3, dtype=torch.bool)))
    B.start(dense)
    with torch.autocast("cpu", torch.bfloat16):
        out = B(z)
    g = torch.randn(2, 4, 5).bfloat16()
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, (z, B.values), g)
    expected = (g.float() @ dense, torch.einsum("btd,btr->dr", g.float(), z).flatten())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.01 * other.norm()


def test_a_product_without_kept_entries() -> None:
    """No mask yet, an empty one, and an empty one over a B to go on from, whose entries all act and none trains."""
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    dense, g = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    B = SparseB(3, 5).double()
    assert torch.equal(B(z), torch.zeros_like(g))
    B.set_mask(pack(torch.zeros(5, 3, dtype=torch.bool)))
    assert torch.equal(B(z), torch.zeros_like(g))
    B.start(dense)
    out = B(z)
    torch.testing.assert_close(out, z @ dense.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(out, z, g)[0], g @ dense, rtol=1e-12, atol=1e-12)
    assert not list(B.parameters())


def test_transforms_and_batched_gradients() -> None:
    """torch.func, forward mode and is_grads_batched agree with a dense B; some entries are frozen."""
    torch.manual_seed(0)
    B, where, start = SparseB(3, 5).double(), torch.rand(5, 3) < 0.5, torch.randn(5, 3, dtype=torch.float64)
    B.set_mask(pack(where))
    B.start(start)
    z, tangent = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    values, index = B.values.detach(), where.flatten().nonzero().flatten()

    def sparse(values: Tensor, z: Tensor) -> Tensor:
        return torch.func.functional_call(B, {"values": values}, (z,)).square()

    def dense(values: Tensor, z: Tensor) -> Tensor:
        return (z @ start.flatten().index_copy(0, index, values).view(5, 3).T).square()

    both, several = (values, z), (torch.stack([values, 2 * values]), torch.stack([z, 2 * z]))
    for ask in (
        lambda f: torch.func.grad(lambda *given: f(*given).sum(), argnums=(0, 1))(*both),
        lambda f: torch.func.jvp(f, both, (values, tangent)),
        lambda f: torch.func.vmap(f)(*several),
        lambda f: torch.func.vmap(f, in_dims=(0, None))(several[0], z),
        lambda f: torch.autograd.functional.jacobian(f, both, vectorize=True),
        lambda f: torch.func.hessian(lambda *given: f(*given).sum())(*both),
    ):
        torch.testing.assert_close(ask(sparse), ask(dense))


def test_nothing_dense_is_kept_for_the_backward_pass() -> None:
    model, mask = lori_s(dtype=torch.float32)
    shapes: list[tuple[int, ...]] = []

    def packed(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(2, 5, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
        layer(x)
    assert (24, 4) not in shapes
    assert (96,) not in shapes
    assert (2, 5, 16) not in shapes  # A has no gradient, so that its input is not kept
    assert (int(kept(mask, "model.layers.0.mlp.up_proj").sum()),) in shapes


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model, _ = lori_s(lora_dropout=0.0)
        model.train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=IDS).logits.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_dropout_of_the_given_rate_falls_on_the_adapters_input_in_training(rate: float) -> None:
    model, _ = lori_s(lora_dropout=rate)
    layer, x = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj"), torch.randn(2, 5, 16).double()
    W, A, B = layer.base_layer.weight, layer.lori_A["default"].weight, layer.lori_B["default"].dense()
    for training in (True, False):
        torch.manual_seed(7)
        out = layer.train(training)(x)
        torch.manual_seed(7)
        dropped = nn.functional.dropout(x, rate, training)
        torch.testing.assert_close(out, x @ W.T + 2.0 * dropped @ A.T @ B.T, rtol=1e-12, atol=1e-12)


def test_bf16_autocast_is_close_to_float64() -> None:
    model, _ = lori_s(dtype=torch.float32)
    exact, _ = lori_s()
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    found.float().square().sum().backward()
    logits(exact).square().sum().backward()
    assert (found - logits(exact)).norm() / logits(exact).norm() < 2e-2
    own, expected = (
        torch.cat([B.values.grad.double() for _, B in factors(m).values() if B.values is not None])
        for m in (model, exact)
    )
    assert (own - expected).norm() / expected.norm() < 5e-2


def test_an_optimizer_step_moves_only_what_is_kept() -> None:
    model, mask = lori_s()
    before = {name: B.dense() for name, (_, B) in factors(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    logits(model).square().sum().backward()
    optimizer.step()
    for name, (_, B) in factors(model).items():
        where = kept(mask, name)
        assert torch.equal(B.dense()[~where], before[name][~where])
        assert (B.dense()[where] != before[name][where]).all()


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lori_s", "lori_moka_s", "lori_moka_d"])
@pytest.mark.parametrize("store_a", [False, True])
def test_save_and_reload_on_the_plain_llm(tmp_path: Path, method: str, store_a: bool) -> None:
    if method == "lori_moka_d":
        model = wrap(small_llm(), method, ["text", "vision", "audio"], {**OPTIONS, "a_seed": 6, "store_a": store_a})
        for _, B in factors(model).values():
            nn.init.normal_(B.weight)
    else:
        model, _ = lori_s(method, a_seed=6, store_a=store_a)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any(key.endswith("_A.weight") for key in saved) == store_a
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is missing
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        for lean in (False, True):
            again = PeftModel.from_pretrained(small_llm(), tmp_path, low_cpu_mem_usage=lean)
            torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-12)
            assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(small_llm(), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again.save_pretrained(tmp_path / "twice")
    twice = load_file(tmp_path / "twice" / "adapter_model.safetensors")
    assert twice.keys() == saved.keys()
    assert all(torch.equal(twice[key], saved[key]) for key in saved)


def test_merging_is_plain_addition() -> None:
    model, _ = lori_s()
    expected, base = logits(model), small_llm()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    A, B = layer.lori_A["default"].weight, layer.lori_B["default"].dense()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(
        layer.base_layer.weight, base.model.layers[0].mlp.up_proj.weight + 2.0 * B @ A, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    with model.disable_adapter():  # which takes it out first
        torch.testing.assert_close(logits(model), base(input_ids=IDS).logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    plain = model.merge_and_unload()
    assert type(plain) is LlamaForCausalLM
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_bfloat16_llm_stays_bfloat16_whatever_the_adapter_is_stored_in(stored: torch.dtype) -> None:
    """h = W x + s B A x against float64; the same merged. PEFT keeps the adapter of such an LLM in float32."""
    model, _ = lori_s(dtype=torch.bfloat16)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    A, B = layer.lori_A["default"], layer.lori_B["default"]
    assert A.weight.dtype == B.values.dtype == torch.float32
    A.to(stored)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    changed = layer.base_layer.weight.double() + 2.0 * B.dense().double() @ A.weight.double()
    expected = x.double() @ changed.T
    for merge in (False, True):
        if merge:
            model.merge_adapter()
            assert layer.base_layer.weight.dtype == torch.bfloat16
        out = layer(x)
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).norm() < 0.01 * expected.norm()
    assert logits(model).dtype == torch.bfloat16


def test_several_adapters_merge_where_they_are_and_into_transposed_weights() -> None:
    torch.manual_seed(0)
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=2, n_positions=32)).double().eval()
    model = get_peft_model(llm, LoriConfig(**OPTIONS, target_modules=["c_attn", "c_fc"]))
    model.add_adapter("other", LoriConfig(r=3, lora_alpha=9, target_modules=["c_fc"], a_seed=9))
    for name in ("default", "other"):
        own = factors(model, name)
        shapes = {key: B.size for key, (_, B) in own.items()}
        everything = {key: pack(torch.ones(shape, dtype=torch.bool)) for key, shape in shapes.items()}
        model.base_model.set_mask(Mask(everything, shapes), name)
        for _, B in own.values():
            nn.init.normal_(B.values)
    model.base_model.set_adapter(["default", "other"])
    attention = model.base_model.model.transformer.h[0].attn.c_attn
    A, B = attention.lori_A["default"].weight, attention.lori_B["default"].dense()
    changed = attention.base_layer.weight + 2.0 * (B @ A).T  # (in, out), as Conv1D has it
    before, expected = copy.deepcopy(model), logits(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(attention.base_layer.weight, changed, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
        model.unmerge_adapter()
        for (name, own), (_, first) in zip(model.named_parameters(), before.named_parameters(), strict=True):
            torch.testing.assert_close(own, first, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, torch.inf), (torch.float16, 1e6)])
def test_a_safe_merge_changes_nothing_where_the_sum_is_not_finite(dtype: torch.dtype, value: float) -> None:
    """A sum that float32 holds, and the weight's float16 does not, is none that is finite."""
    model, _ = lori_s(dtype=dtype)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    layer.lori_B["default"].values.data[0] = value
    assert value == torch.inf or torch.isfinite(layer.get_delta_weight("default")).all()
    before = layer.base_layer.weight.clone()
    with pytest.raises(AdapterError, match="Merging 'default' gives weights that are not finite; nothing was changed"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
    layer.merge()  # whoever does not ask gets it
    assert not torch.isfinite(layer.base_layer.weight).all()


def test_offloaded_weights_are_merged_where_peft_loads_them() -> None:
    (model, _), (other, _) = lori_s(), lori_s()
    cpu_offload(other, execution_device=torch.device("cpu"))
    layer = other.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    with pytest.raises(AdapterError, match="cannot be merged into a Linear whose weight is offloaded"):
        layer.merge()
    model.merge_adapter()
    other.merge_adapter()
    assert layer.base_layer.weight.is_meta
    assert torch.equal(logits(other), logits(model))


def test_several_adapters_pickle_and_deepcopy() -> None:
    model, _ = lori_s()
    first = logits(model)
    model.add_adapter("other", LoriConfig(r=3, lora_alpha=3, target_modules=["q_proj", "up_proj"], a_seed=9))
    where = {name: torch.ones(B.out_features, B.in_features).bool() for name, (_, B) in factors(model, "other").items()}
    model.base_model.set_mask(
        Mask({n: pack(w) for n, w in where.items()}, {n: tuple(w.shape) for n, w in where.items()}), "other"
    )
    for _, B in factors(model, "other").values():
        nn.init.normal_(B.values)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.base_model.set_adapter(["default", "other"])
    assert not torch.equal(logits(model), second)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), small_llm()(input_ids=IDS).logits)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), first)


def test_the_text_path_of_a_sparse_moka_folds() -> None:
    model, _ = lori_s("lori_moka_s")
    expected = logits(model.eval())
    model.base_model.fold_text()
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    model.base_model.unfold_text()
    assert torch.equal(logits(model), expected)


# ---- going on from an adapter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lori_d", "lori_s"])
def test_going_on_keeps_what_lies_outside_the_mask(tmp_path: Path, method: str) -> None:
    model = wrap(small_llm(), method, ["text"], OPTIONS)
    before = random_b(model, seed=4)
    source = Source("safety", {n: ((4, A.in_features), tuple(before[n].shape)) for n, (A, _) in factors(model).items()}, 2.0,
                    lambda name: draw(name, source.shapes[name][0], 77), before.__getitem__)  # fmt: skip
    adopt_a(model, source)
    if method == "lori_s":
        assert model.peft_config["default"].store_a  # no seed of this adapter's gives that A
        mask = cut(random_b(model, seed=5))
        model.base_model.set_mask(mask)
    start_b(model, source)
    for name, (A, B) in factors(model).items():
        assert torch.equal(A.weight.float(), source.a(name))
        assert torch.equal(B.dense() if method == "lori_s" else B.weight, before[name])
    if method == "lori_d":
        return
    assert model.get_nb_trainable_parameters()[0] == mask.kept
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits(model).square().sum().backward()
    optimizer.step()
    expected = logits(model)
    for name, (_, B) in factors(model).items():
        where = kept(mask, name)
        assert torch.equal(B.dense()[~where], before[name][~where])
        assert (B.dense()[where] != before[name][where]).all()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(small_llm(), tmp_path)), expected, rtol=0, atol=1e-12)
    again = wrap(small_llm(), method, ["text"], OPTIONS)  # as a run is loaded, whose options know of the seed's A only
    load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-12)


def test_what_cannot_be_gone_on_from() -> None:
    model = wrap(small_llm(), "lori_s", ["text"], OPTIONS)
    shapes = {name: (tuple(A.weight.shape), B.size) for name, (A, B) in factors(model).items()}
    first = next(iter(shapes))
    wrong = {**shapes, first: ((8, 16), (16, 8)), "model.layers.9.x": ((4, 16), (16, 4))}
    with pytest.raises(AdapterError, match=r"safety cannot be gone on from") as error:
        adopt_a(model, Source("safety", wrong, 1.0, lambda name: draw(name, (4, 16), 0), None))  # type: ignore[arg-type]
    assert "model.layers.9.x is adapted there and not here" in str(error.value)
    assert f"{first}: A and B are" in str(error.value)
    assert "lora_alpha / r is 1 there and 2 here" in str(error.value)


def test_layers_that_the_source_lacks_are_named_before_anything_is_changed() -> None:
    model = wrap(small_llm(), "lori_s", ["text"], OPTIONS)
    shapes = {name: (tuple(A.weight.shape), B.size) for name, (A, B) in factors(model).items()}
    lacking, before = list(shapes)[0::3], a_digest(model)
    fewer = {name: shape for name, shape in shapes.items() if name not in lacking}
    with pytest.raises(AdapterError, match=f"{lacking[0]} is adapted here and not there") as error:
        adopt_a(model, Source("safety", fewer, 2.0, lambda name: draw(name, shapes[name][0], 9), None))  # type: ignore[arg-type]
    assert len(lacking) == 5
    assert str(error.value).count("is adapted here and not there") == 4
    assert str(error.value).endswith("... and 1 more")
    assert a_digest(model) == before


@pytest.mark.parametrize("seed", [0, 9])
def test_a_lori_d_begins_at_the_a_of_a_lori_s(tmp_path: Path, seed: int) -> None:
    """As the first phase of a run that goes on from one: A is that of the source, the source stays as it is."""
    old, _ = lori_s(a_seed=seed)
    old.save_pretrained(tmp_path)
    source = AdapterFolder.open(tmp_path).source()
    settings = dict(source.settings)
    for method in ("lori_d", "lori_s"):
        model = wrap(small_llm(), method, ["text"], OPTIONS)
        own = a_digest(model)
        adopt_a(model, source)
        assert a_digest(model) == a_digest(old)
        assert source.settings == settings
        assert settings["peft_type"] == "LORI_S"
        if method == "lori_s":  # an A that its own seed gives is remade, another one is stored
            config = model.peft_config["default"]
            assert (config.store_a, config.a_hash) == ((False, own) if seed == 0 else (True, None))


def test_an_adapter_of_another_name_is_gone_on_with() -> None:
    model, _ = lori_s()
    before = {name: (A.weight.clone(), B.dense()) for name, (A, B) in factors(model).items()}
    model.add_adapter("other", LoriConfig(r=3, lora_alpha=3, target_modules=["q_proj"], a_seed=9))
    own = factors(model, "other")
    generator = torch.Generator().manual_seed(3)
    dense = {name: torch.randn(B.size, dtype=torch.float64, generator=generator) for name, (_, B) in own.items()}
    model.base_model.set_mask(cut(dense), "other")
    shapes = {name: ((3, A.in_features), B.size) for name, (A, B) in own.items()}
    source = Source("safety", shapes, 1.0, lambda name: draw(name, shapes[name][0], 77), dense.__getitem__)
    adopt_a(model, source, "other")
    start_b(model, source, "other")
    for name, (A, B) in factors(model, "other").items():
        assert torch.equal(A.weight.float(), draw(name, shapes[name][0], 77))
        assert torch.equal(B.dense(), dense[name])
    for name, (A, B) in factors(model).items():
        assert torch.equal(A.weight, before[name][0])
        assert torch.equal(B.dense(), before[name][1])
    assert model.peft_config["other"].store_a
    assert not model.peft_config["default"].store_a


def test_what_a_newer_version_wrote_is_not_gone_on_from(tmp_path: Path) -> None:
    model = wrap(small_llm(), "lori_moka_d", ["text", "vision"], OPTIONS)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_heads": 2}))
    with pytest.raises(AdapterError, match="attention_heads: 2 there, a setting that this version does not know"):
        adopt_a(model, AdapterFolder.open(tmp_path).source())


def test_what_another_peft_wrote_of_its_own_is_gone_on_from(tmp_path: Path) -> None:
    wrap(small_llm(), "lori_d", ["text"], OPTIONS).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "a_later_option": 16}))
    adopt_a(wrap(small_llm(), "lori_d", ["text"], OPTIONS), AdapterFolder.open(tmp_path).source())


def test_other_modalities_are_refused_and_other_mathematics_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrap(small_llm(), "lori_moka_d", ["text", "vision"], {**OPTIONS, "a_seed": 3}).save_pretrained(tmp_path)
    source = AdapterFolder.open(tmp_path).source()
    options = {**OPTIONS, "attention_weight": 0.05, "scale_logits": False}
    speech = wrap(small_llm(), "lori_moka_d", ["text", "speech"], options)
    before = a_digest(speech)
    with pytest.raises(AdapterError, match=r"modalities: .*'vision'.* there, .*'speech'.* in the configuration"):
        adopt_a(speech, source)
    assert a_digest(speech) == before
    assert not caplog.messages
    for method in ("lori_moka_d", "lori_moka_s"):
        caplog.clear()
        vision = wrap(small_llm(), method, ["text", "vision"], options)
        adopt_a(vision, source)
        assert a_digest(vision) == a_digest(wrap(small_llm(), method, ["text", "vision"], {**OPTIONS, "a_seed": 3}))
        assert [message.split("another ")[1].split(":")[0] for message in caplog.messages] == [
            "attention_weight",
            "scale_logits",
        ]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_masks_of_other_models_are_refused() -> None:
    model = wrap(small_llm(), "lori_s", ["text"], OPTIONS)
    wider = wrap(small_llm(width=32), "lori_s", ["text"], OPTIONS)
    with pytest.raises(AdapterError, match="belongs to another model, rank or choice of modules") as error:
        model.base_model.set_mask(cut(random_b(wider)))
    assert "model.layers.0.self_attn.q_proj: B is (16, 4), the mask is for (32, 4)" in str(error.value)
    fewer = wrap(small_llm(), "lori_s", ["text"], {**OPTIONS, "target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match="the mask does not know it") as error:
        model.base_model.set_mask(cut(random_b(fewer)))
    assert str(error.value).count("the mask does not know it") == 4
    assert "... and 8 more" in str(error.value)  # of 14 layers two are q_proj
    with pytest.raises(AdapterError, match="the model does not adapt it"):
        fewer.base_model.set_mask(cut(random_b(model)))
    with pytest.raises(AdapterError, match="trained with another A"):
        model.base_model.set_mask(cut(random_b(model), a_hash="0" * 64))
    with pytest.raises(AdapterError, match="B is dense: a mask needs lori_s"):
        wrap(small_llm(), "moka", ["text"], OPTIONS).base_model.set_mask(cut(random_b(model)))
    assert not any(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_sparsities_outside_their_range(sparsity: float) -> None:
    with pytest.raises(AdapterError, match="sparsity must lie between 0 and 1"):
        keep_top({"x": (2, 2)}, lambda name: torch.ones(2, 2), sparsity)


def test_another_a_is_refused_on_load(tmp_path: Path) -> None:
    model, _ = lori_s()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    stored = json.loads(path.read_text())
    for change, message in (
        ({"a_seed": 1}, "A cannot be remade: drawn from seed 1"),
        ({"a_version": 2}, "generator version 2"),
        ({"format_version": 2, "invented_later": 1}, "LORI_S adapter has format 2, written by a newer mokamm"),
        ({"format_version": "2"}, "format_version must be a whole number; found '2'"),
        ({"store_a": True}, "its A is stored"),
        ({"r": 0}, "r must be a whole number"),
    ):
        path.write_text(json.dumps({**stored, **change}))
        with pytest.raises(AdapterError, match=message):
            PeftModel.from_pretrained(small_llm(), tmp_path)
    path.write_text(json.dumps(stored))
    with pytest.raises(AdapterError, match="A cannot be remade"):
        PeftModel.from_pretrained(small_llm(width=32), tmp_path)
    path.write_text(json.dumps({**stored, "a_version": 2, "a_hash": "0" * 64}))  # into a model that is there already
    with pytest.raises(AdapterError, match="generator version 2"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("method", ["lori_s", "lori_moka_s"])
def test_a_stored_a_needs_no_generator(tmp_path: Path, method: str) -> None:
    model, _ = lori_s(method, store_a=True, a_seed=5)
    for _, (A, _) in factors(model).items():  # as another generator would draw it
        A.weight.data.mul_(-1.5)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    newer = {**json.loads(path.read_text()), "a_version": 2}
    for a_hash in (None, a_digest(model)):
        path.write_text(json.dumps({**newer, "a_hash": a_hash}))
        for lean in (False, True):
            again = PeftModel.from_pretrained(small_llm(), tmp_path, low_cpu_mem_usage=lean)
            torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-12)
    path.write_text(json.dumps({**newer, "a_hash": "0" * 64}))
    with pytest.raises(AdapterError, match="The stored A is not the one whose hash"):
        PeftModel.from_pretrained(small_llm(), tmp_path)


def test_a_newer_moka_is_refused(tmp_path: Path) -> None:
    wrap(small_llm(), "moka", ["text"], OPTIONS).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(AdapterError, match="MOKA adapter has format 2, written by a newer mokamm"):
        PeftModel.from_pretrained(small_llm(), tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model, _ = lori_s()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    key = next(key for key in whole if key.endswith("0.mlp.up_proj.lori_B.mask"))
    for tensors, message in (
        ({k: t for k, t in whole.items() if k != key}, "holds no .*lori_B.mask"),
        ({**whole, key: whole[key][:-1].clone()}, "its mask .* is not one of a B"),
        (
            {**whole, key.replace("_B.mask", "_A.shape"): torch.tensor([9, 9], dtype=torch.int32)},
            "A is .9, 9. in the folder",
        ),
    ):
        save_file(tensors, path)
        with pytest.raises(AdapterError, match=message):
            PeftModel.from_pretrained(small_llm(), tmp_path)


def test_quantized_weights_are_not_merged() -> None:
    model, _ = lori_s()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    layer.base_layer.weight = nn.Parameter(torch.zeros(192, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match="cannot be merged into a Linear whose weight is"):
        model.merge_adapter()


def test_a_sparse_b_needs_a_frozen_a() -> None:
    with pytest.raises(AdapterError, match="sparse_b needs frozen_a"):
        MokaConfig(sparse_b=True)
