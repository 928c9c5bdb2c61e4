"""q, k and v, and gate and up, computed together: the numbers of the plain path, whatever happens between."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from mokamm.adapters import MokaConfig, RoutedLinear, routed, set_routing
from mokamm.adapters.routed_fast import together
from mokamm.routing import Routing
from tests.mokamm.toy_routed import assert_close


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

    @pytest.mark.parametrize("change", ["eval", "fold_text"])
    def test_one_that_drops_nothing_or_is_folded_is_computed_alone(self, change: str) -> None:
        _, attention, x = self.parts(lora_dropout=0.5 if change == "eval" else 0.0)
        with torch.no_grad():
            expected = attention.k_proj.eval()(x)
            attention.k_proj.train()
            getattr(attention.k_proj, change)()
            attention.q_proj.siblings._begin(attention)
            attention.q_proj(x)
            assert set(attention.q_proj.siblings.waiting.outputs) == {attention.v_proj}
            torch.testing.assert_close(attention.k_proj(x), expected, rtol=0, atol=1e-12)

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

    @pytest.mark.parametrize("name", ["q_proj", "k_proj", "up_proj"])
    def test_a_wrapper_that_passes_attributes_on_is_no_sibling(self, name: str) -> None:
        model = self.llm()
        before = self.gradients(model)
        for layer in model.base_model.model.model.layers:
            parent = layer.mlp if name == "up_proj" else layer.self_attn
            setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))
        after = {key.replace("._orig_mod", ""): value for key, value in self.gradients(model).items()}
        assert_close(after, before, 1e-12)

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
        attention.register_forward_hook(partial(lambda *_: None, threading.Lock()))  # which cannot be copied
        with pytest.raises(TypeError):
            copy.deepcopy(attention)
        alone = copy.deepcopy(attention.q_proj)
        torch.testing.assert_close(alone(x), attention.q_proj(x))

    def test_unloading_leaves_no_hook(self) -> None:
        model, attention, _ = self.parts()
        model.add_adapter("more", MokaConfig(r=2, target_modules=["q_proj", "v_proj"]))
        assert len(attention._forward_hooks) == len(attention._forward_pre_hooks) == 1
        llm, calls = model.base_model.model, []
        assert len(llm._forward_hooks) == len(llm._forward_pre_hooks) == 1  # the context's, once
        own = [module.register_forward_hook(lambda *_: calls.append(1)) for module in (llm, attention)]
        llm = model.unload()
        llm(input_ids=torch.tensor([[3]]))
        assert len(calls) == 2  # whoever else has hooks there keeps them
        for hook in own:
            hook.remove()
        for module in llm.modules():
            kinds = [kind for kind, found in vars(module).items() if "_forward_" in kind and "hooks" in kind and found]
            assert not kinds

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

    def test_a_folded_model_has_no_hooks_and_an_unfolded_one_shares_again(self) -> None:
        model = self.llm()
        base, layers = model.base_model, list(model.base_model.routed_layers())
        before = self.gradients(model)

        def hooks() -> int:
            layers = (m for m in base.model.modules() if m is not base.model)  # the LLM's tell a prompt from a step
            return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in layers)

        shared = hooks()
        assert shared
        assert {len(layer.siblings.names) for layer in layers} == {0, 2, 3}
        for unfold in (base.unfold_text, partial(base.set_adapter, "default"), partial(base.to, torch.float64)):
            base.fold_text()
            assert hooks() == 0
            assert not any(layer.siblings.names for layer in layers)
            unfold()
            assert_close(self.gradients(model), before, 1e-12)  # the routing is set, at the latest, before training
            assert hooks() == shared
            assert {len(layer.siblings.names) for layer in layers} == {0, 2, 3}

    def test_an_attention_that_reads_two_inputs_has_none(self) -> None:
        parts = {name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        model = nn.ModuleDict({"cross_attn": nn.ModuleDict(parts), "self_attn": nn.ModuleDict(copy.deepcopy(parts))})
        get_peft_model(model, MokaConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
        sizes = {name: len(layer.siblings.names) for name, layer in model.named_modules() if hasattr(layer, "siblings")}
        assert {name for name, size in sizes.items() if size == 3} == {f"self_attn.{n}_proj" for n in "qkv"}
        assert sizes["cross_attn.q_proj"] == sizes["self_attn.o_proj"] == 0
