r"""MokA and its kin: one low-rank A per modality, cross-modal attention in the rank space, one shared B.

    text token         h = W x + s B A_text x
    media token, m     h = W x + s B (A_m x + lambda Att_m)
    padding            h = W x
                       Att_m = softmax(A_m x (A_text x_q)^T / sqrt(r)) (A_text x_q)

    x_BTD --dropout--> [A_text; A_1; ..] x      one GEMM with the stacked A           (B,T,M*r)
              --routing: own modality-->  z     a masked sum over M                   (B,T,r)
              --routing: key positions--> k     a gather of the text path             (B,Q,r)
                    z + lambda softmax(z k^T) k at media tokens                       (B,T,r)
              --------B--------> + W x          one GEMM                              (B,T,D)

s = alpha/r, keys = values = the question's tokens through A_text, an independent softmax per media token (arXiv
2506.05191). Two variants are published, chosen by `scale_logits`: either s multiplies A's output before the attention
(logits then carry s^2) or B's output (logits carry none). Both come to s B(u + lambda att(u)) with u = A x unscaled:
only the scalar before the softmax differs, and that is how it is computed here. Checkpoints of the published audio-visual
code until 2025-12-28 divide by sqrt(number of keys) in place of sqrt(r): `logits_by_keys`. Further switches make the family:
`shared_b=False` with `attention_weight=0` is one LoRA per modality, `frozen_a` is LoRI on MokA, with `sparse_b` LoRI-S
on MokA (`model.base_model.set_mask(mask)`; frozen_tuner.py, sparse_b.py).

`fold_text` puts the text path into the frozen weight, W' = W + s B A_text, so that one set of weights prefills and
decodes: text then costs nothing, a media token adds s B((A_m - A_text) x + lambda att), padding adds -s B A_text x.

This file has the plain path, which serves folded weights, keys that are not text, and compilers; `routed_fast.py` computes
the same by hand-written derivatives everywhere else. Cost per layer beside W x: 2 GEMMs of width M*r and r and about nine
small kernels, whatever the batch; no loop over samples, no wait for the device.

Shape legend: B batch, T tokens, D width, R rank, M modalities, Q key tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, cast

import torch
from peft import PeftConfig, PeftType
from torch import Tensor, nn

from mokamm.adapters.checks import check_attention_weights, check_format, check_lora_options, plain_weight
from mokamm.adapters.frozen_a import VERSION
from mokamm.adapters.frozen_tuner import FrozenATuner, new_a, new_b
from mokamm.adapters.peft_bridge import TunerLayer, register_method, tied_layers
from mokamm.adapters.routed_context import RoutingContext
from mokamm.adapters.routed_fast import DownProjection, FrozenDownProjection, UpProjection, together
from mokamm.adapters.routed_fold import FOLDED, Fold, WithoutDerivative
from mokamm.adapters.routed_plan import Settings, plan_of
from mokamm.adapters.routed_siblings import Siblings, find_siblings, part_siblings
from mokamm.adapters.sparse_b import dense_weight
from mokamm.adapters.standing_in import is_bare, under_transform
from mokamm.adapters.targets import first_match
from mokamm.routing import AdapterError, Routing

FORMAT = 1
UNMERGEABLE = (
    "A routed adapter cannot be merged: each modality has a weight of its own, and a media token's update depends on the "
    "question. fold_text() puts the text path alone into the weights (decoding then costs as much as the base model); "
    "unload() gives the base model back without the adapter."
)


@dataclass
class MokaConfig(PeftConfig):
    """Configuration of the routed adapter; `modalities[0]` is the text path.

    Raises:
        AdapterError: a value outside its range.
    """

    r: int = field(default=4, metadata={"help": "rank of every A and of B"})
    lora_alpha: float = field(default=16, metadata={"help": "the update is scaled by s = lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input, in training"})
    modalities: list[str] = field(default_factory=lambda: ["text", "vision", "audio"])
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "names, a regex, or all-linear (without the output head)"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names or a regex left out"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "whole modules that train and are saved beside the adapter, such as a new head"}
    )
    attention_weight: float = field(default=1.0, metadata={"help": "lambda; 0 = no cross-modal attention"})
    attention_weight_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "regex of module names -> lambda there"}
    )
    scale_logits: bool = field(default=True, metadata={"help": "True: s before the attention; False: s after B"})
    logits_by_keys: bool = field(
        default=False,
        metadata={
            "help": "True: logits over sqrt(number of keys), as MokA's code until 2025-12-28; False: over sqrt(r)"
        },
    )
    shared_b: bool = field(default=True, metadata={"help": "False: one B per modality"})
    frozen_a: bool = field(default=False, metadata={"help": "True: A stays at its random initialisation"})
    sparse_b: bool = field(default=False, metadata={"help": "True: of B only the entries of a mask train"})
    a_seed: int = field(default=0, metadata={"help": "a frozen A is drawn from it"})
    a_version: int = field(default=VERSION, metadata={"help": "of the generator that draws a frozen A"})
    a_hash: str | None = field(default=None, metadata={"help": "sha256 of a frozen A, set when the model is wrapped"})
    store_a: bool = field(default=False, metadata={"help": "write a frozen A into the file instead of remaking it"})
    format_version: int = FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MOKA")
        check_format(self, FORMAT)
        check_lora_options(self)
        if self.sparse_b and not self.frozen_a:
            raise AdapterError("sparse_b needs frozen_a: a mask belongs to the A that it was cut under.")
        check_attention_weights(self.attention_weight, self.attention_weight_pattern)
        names = self.modalities = list(self.modalities)
        if names[:1] != ["text"] or len(set(names)) < len(names):
            raise AdapterError(f"modalities must be distinct names, 'text' first; found {names}.")


class RoutedLinear(TunerLayer):
    """A frozen linear module with one or more routed adapters."""

    adapter_layer_names = ("moka_A", "moka_B")
    other_param_names = ("settings", "moka_dropout")

    def __init__(self, base_layer: nn.Module, context: RoutingContext) -> None:
        super().__init__(base_layer)
        self.context, self.siblings = context, Siblings()
        self.settings: dict[str, Settings] = {}
        self.folds: dict[str, Fold] = {}
        self.moka_dropout, self.moka_A, self.moka_B = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    def add_adapter(self, name: str, config: MokaConfig, key: str) -> None:
        r, s, rows = config.r, config.lora_alpha / config.r, config.r * len(config.modalities)
        pattern = first_match(config.attention_weight_pattern, key)
        weight = config.attention_weight if pattern is None else config.attention_weight_pattern[pattern]
        # the attention below sees own = s u as its queries and u as its keys: s u u^T here, s^2 u u^T or u u^T wanted
        logit_scale = (s if config.scale_logits else 1 / s) / math.sqrt(r)
        modalities, by_keys = len(config.modalities), config.logits_by_keys
        self.settings[name] = Settings(r, s, modalities, float(weight), logit_scale, config.shared_b, by_keys)
        self.moka_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.moka_A[name] = new_a(self, rows, config, key, DownProjection, FrozenDownProjection)
        self.moka_B[name] = new_b(self, r if config.shared_b else rows, config, UpProjection)
        self.place(name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.folds and not torch.is_grad_enabled() and self.context.steps_are_text and x.shape[1:-1] == (1,):
            base = self._modules["base_layer"]  # W holds the text path; in few calls, so that decoding costs the base's
            own: dict[str, Any] = base._parameters  # type: ignore[union-attr]
            if not is_bare(base, nn.Linear) or "weight" not in own or "bias" not in own:
                return self.base_layer(x, *args, **kwargs)
            return nn.functional.linear(x, own["weight"], own["bias"])
        names = self._acting()
        if names and self.siblings.waiting is not None:
            ready = self.siblings.take(self, x, self.context.routing)
            if ready is not None:
                return ready
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if self.folds and self.training and torch.is_grad_enabled():
            raise AdapterError(FOLDED)
        routing = self.context.look_up(x)
        if self._can_be_fast(names, x, routing):
            return self._fast(names, routing, x, *args, **kwargs)
        h = out = self.base_layer(x, *args, **kwargs)
        for name in names:
            if routing is not None:
                x_BTD = x if x.dim() == 3 else x.reshape(*(routing.shape or ()), -1)
                out = out + self._routed(name, x_BTD, routing).view_as(h)
            elif name not in self.folds:
                out = out + self._text(name, x)
        if self.folds and any(self._trains(name) for name in names) and not torch.compiler.is_compiling():
            out = WithoutDerivative.apply(out)
        return out.to(h.dtype)

    def _trains(self, name: str) -> bool:
        factors = self.moka_A[name], self.moka_B[name]
        return torch.is_grad_enabled() and any(w.requires_grad for factor in factors for w in factor.parameters())

    def _acting(self) -> list[str]:
        """The adapters that act, in their order."""
        if self.disable_adapters:
            return []
        held = self._modules["moka_A"]._modules  # type: ignore[union-attr]
        return [name for name in self.active_adapters if name in held]

    # -- the fast path: routed_fast.py --

    def _can_be_fast(self, names: list[str], x: Tensor, routing: Routing | None) -> bool:
        """Else the plain path: it folds, reads keys that are not text, has sparse B's, suits compilers and torch.func."""
        if self.folds or torch.compiler.is_compiling() or under_transform() or not x.is_floating_point():
            return False
        if routing is not None and not routing.keys_are_text:
            return False
        for name in names:
            if self.settings[name].by_keys or not isinstance(self._factor(name, "moka_B"), UpProjection):
                return False
        return isinstance(self._modules["base_layer"], nn.Linear) or _seen(x) == x.dtype

    def _fast(self, names: list[str], routing: Routing | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(names) == 1 and self._is_bare(names[0], x):
            return self._with_siblings(names[0], routing, x)
        x, parts = x.to(_seen(x)), []
        for name in names:
            plan = plan_of(self.settings[name], routing, x.dtype)
            x, u = self.moka_A[name](x, plan, self._dropout(name))
            parts.append((name, u, plan))
        h = self.base_layer(x, *args, **kwargs)
        for name, u, plan in parts:
            h = self.moka_B[name](u, h, plan)
        return h

    def _with_siblings(self, name: str, routing: Routing | None, x: Tensor) -> Tensor:
        """This layer's output, and in the same go that of its siblings, which will be asked for theirs next."""
        others = [] if x.is_inference() else self.siblings.others(self)  # an inference tensor does not tell of changes
        layers = [self, *(layer for layer in others if layer._can_join(self, name, x))]
        read = x.to(_seen(x))
        plan = plan_of(self.settings[name], routing, read.dtype, len(layers))
        a = [layer._factor(name, "moka_A")._parameters["weight"] for layer in layers]
        b = [layer._factor(name, "moka_B")._parameters["weight"] for layer in layers]
        linears = [layer._modules["base_layer"] for layer in layers]
        outs = together(read, linears, a, b, plan, self._dropout(name))
        self.siblings.keep(dict(zip(layers[1:], outs[1:], strict=True)), x, self.context.routing)
        return outs[0]

    def _can_join(self, first: RoutedLinear, name: str, x: Tensor) -> bool:
        """Whether this layer can be computed together with `first`, whose only active adapter has this name."""
        if self._acting() != [name]:
            return False
        alike = self.settings[name] == first.settings[name] and self._dropout(name) == first._dropout(name)
        return alike and self.settings[name].shared_b and not self.folds and self._is_bare(name, x)

    def _is_bare(self, name: str, x: Tensor) -> bool:
        """Whether this layer is a frozen Linear that reads x as it is, A and B; no hook or the like hangs on any."""
        base, A, B = self._modules["base_layer"], self._factor(name, "moka_A"), self._factor(name, "moka_B")
        if not (
            is_bare(base, nn.Linear) and is_bare(A, DownProjection, FrozenDownProjection) and is_bare(B, UpProjection)
        ):
            return False
        own: dict[str, Any] = base._parameters  # type: ignore[union-attr]
        if "bias" not in own or type(weight := own.get("weight")) is not nn.Parameter:
            return False  # views of a flat tensor, as some wrappers have; or of a class of its own
        if weight.requires_grad or (own["bias"] is not None and own["bias"].requires_grad):
            return False
        return weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)

    def _dropout(self, name: str) -> float:
        return getattr(self._factor(name, "moka_dropout"), "p", 0.0) if self.training else 0.0

    def _factor(self, name: str, kind: str) -> nn.Module:
        """self.moka_A[name] or the like, without the detours of attributes: every layer asks every step."""
        return self._modules[kind]._modules[name]  # type: ignore[union-attr, return-value]

    # -- the plain path --

    def _stacked(self, name: str, x: Tensor) -> Tensor:
        """Every modality's A x at once: (..., M*r)."""
        A = cast(nn.Linear, self.moka_A[name])
        return A(self.moka_dropout[name](self._cast_input_dtype(x, A.weight.dtype)))

    def _text(self, name: str, x: Tensor) -> Tensor:
        """s B A_text x."""
        at = self.settings[name]
        z = self._stacked(name, x)[..., : at.r] * at.scaling
        if not at.shared_b:
            z = nn.functional.pad(z, (0, (at.modalities - 1) * at.r))
        return self.moka_B[name](z)

    def _routed(self, name: str, x_BTD: Tensor, routing: Routing) -> Tensor:
        """s B (A_m x + lambda att) at every token, less the text path where that is folded into W."""
        at, folded = self.settings[name], name in self.folds
        u_BTMR = self._stacked(name, x_BTD).unflatten(-1, (at.modalities, at.r))
        own_BTMR = u_BTMR * routing.selection(at.modalities, u_BTMR.dtype, at.scaling)
        z = query_BTR = own_BTMR.sum(2)
        if folded:  # the query stays A_m x, what is added is (A_m - A_text) x
            own_BTMR = u_BTMR * routing.selection(at.modalities, u_BTMR.dtype, at.scaling, less_text=True)
            z = own_BTMR.sum(2)
        if not at.shared_b:
            z = own_BTMR
        if at.attention_weight and at.modalities > 1:
            att_BTR = self._attention(at, query_BTR, u_BTMR[:, :, 0], routing)
            if at.shared_b:
                where, att = routing.any_media(at.modalities, z.dtype), att_BTR
            else:
                where, att = routing.media(at.modalities, z.dtype), att_BTR.unsqueeze(2)
            z = torch.addcmul(z, where, att, value=at.attention_weight * at.scaling)
        return self.moka_B[name](z if at.shared_b else z.flatten(2))

    @staticmethod
    def _attention(at: Settings, query_BTR: Tensor, text_BTR: Tensor, routing: Routing) -> Tensor:
        """softmax(A_m x (A_text x_q)^T / sqrt(r)) (A_text x_q), unscaled, at every token: (B,T,R)."""
        assert routing.key_index is not None
        if at.by_keys:
            query_BTR = query_BTR * (math.sqrt(at.r) * routing.inverse_root_of_keys(query_BTR.dtype))
        key_BQR = text_BTR.gather(1, routing.key_index.unsqueeze(-1).expand(-1, -1, at.r))
        bias_B1Q = routing.key_bias(query_BTR.dtype)
        logits_BTQ = torch.baddbmm(bias_B1Q, query_BTR, key_BQR.transpose(1, 2), alpha=at.logit_scale)
        return torch.bmm(logits_BTQ.softmax(-1).to(key_BQR.dtype), key_BQR)

    # -- the text path inside W: routed_fold.py --

    @property
    def base_weight(self) -> Tensor:
        return cast(Tensor, self.get_base_layer().weight)

    def check_foldable(self) -> None:
        """Raises AdapterError where the weight is not a plain, whole, floating-point matrix."""
        instead = "Decode without fold_text(), or load the LLM unquantized and whole."
        plain_weight(self, "The text path cannot be folded into", instead)

    @torch.no_grad()
    def fold_text(self) -> None:
        """W' = W + s B A_text in place, for each active adapter; nothing where it is folded already."""
        self.check_foldable()
        for name in self.active_adapters:
            if name not in self.moka_A or name in self.folds or self.disable_adapters:
                continue
            r = self.settings[name].r
            b = dense_weight(self.moka_B[name])[:, :r] * self.settings[name].scaling
            a = dense_weight(self.moka_A[name])[:r].clone()
            self.folds[name] = Fold.into(self.base_weight, b, a, self.weight_is_transposed)

    def unfold_text(self) -> None:
        """Takes the text path out of W again; W is bit-identical to what it was."""
        for name in reversed(list(self.folds)):
            self.folds.pop(name).out_of(self.base_weight)

    # -- PEFT's bookkeeping: whatever changes which adapter acts, or its weights, takes the folded one out first --

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.unfold_text()  # to another dtype, or device
        return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.unfold_text()  # a state dict holds the weights themselves, which others may load
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfold_text()
        super()._load_from_state_dict(*args, **kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.unfold_text()
        self.siblings.clear()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        self.unfold_text()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise AdapterError(UNMERGEABLE)

    def unmerge(self) -> None:
        """Nothing to do: nothing is ever merged."""


def _seen(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer reads x."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


class MokaModel(FrozenATuner):
    """The tuner: holds the routing of the current batch for all of its layers."""

    prefix = "moka_"
    tuner_layer_cls = RoutedLinear
    factors = ("moka_A", "moka_B")

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.context, self.parted = RoutingContext(), False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        find_siblings(model, RoutedLinear)
        self._join_checkpointing(model)
        self.context.watch(model)

    def new_layer(self, target: nn.Module) -> RoutedLinear:
        return RoutedLinear(target, self.context)

    def check_config(self, config: MokaConfig, names: list[str]) -> None:
        for pattern in config.attention_weight_pattern:
            if not any(first_match([pattern], name) for name in names):
                raise AdapterError(
                    f"attention_weight_pattern: '{pattern}' matches none of the {len(names)} adapted modules, such as "
                    f"'{names[0]}'. A pattern matches a whole name, or its end from a dot on."
                )

    def set_routing(self, routing: Routing | None) -> None:
        """The routing of the next forward passes, until the next call; None takes it away."""
        if routing is not None and not isinstance(routing, Routing):
            raise AdapterError(f"set_routing expects a Routing; found {type(routing).__name__}.")
        if self.parted and not self.folded:  # whatever has unfolded it
            self._join()
        if routing is not None:
            for name in self.active_adapters:
                routing.check_modalities(len(cast(MokaConfig, self.peft_config[name]).modalities))
        self.context.routing = routing

    def routed_layers(self) -> Iterator[RoutedLinear]:
        return (module for module in self.model.modules() if isinstance(module, RoutedLinear))

    @property
    def folded(self) -> bool:
        return any(layer.folds for layer in self.routed_layers())

    def fold_text(self) -> None:
        """Puts the active adapters' text path into the weights, for inference.

        Changing adapters, `.to()`, or asking for a state dict takes it out again.

        Raises:
            AdapterError: before anything is changed, where a weight is quantized, sharded, or another module's too.
        """
        layers = list(self.routed_layers())
        for layer in layers:
            layer.check_foldable()
        if tied_layers(self.model):
            raise AdapterError("The text path cannot be folded into a weight that another module shares (tied).")
        for layer in layers:
            layer.fold_text()
        part_siblings(self.model)  # of no use then, and hooks cost 1 % of a small LLM's decoding
        self.parted = True

    def unfold_text(self) -> None:
        """Takes the text path out again; the weights are bit-identical to what they were."""
        for layer in self.routed_layers():
            layer.unfold_text()
        if self.parted:
            self._join()

    def _join(self) -> None:
        find_siblings(self.model, RoutedLinear)
        self.parted = False

    def _check_merge_allowed(self) -> NoReturn:
        """Before anything is changed: PEFT would take the `modules_to_save` off before it comes to the first layer."""
        raise AdapterError(UNMERGEABLE)

    def unload(self) -> nn.Module:
        """The LLM without the adapter, its weights bit-identical to what they were, but those of `modules_to_save`."""
        self.unfold_text()
        part_siblings(self.model)
        self.context.leave(self.model)
        return super().unload()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The LLM's own, and each forward is recomputed under the routing it was run with.

        Reentrant checkpointing knows no such thing: there, run the backward pass before the next `set_routing`.
        """
        self.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=self._checkpointing(gradient_checkpointing_kwargs), **kwargs
        )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As `gradient_checkpointing_enable`, by its newer name (which older transformers do not know)."""
        if not hasattr(self.model, "activation_checkpointing_enable"):
            return self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        self.model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=self._checkpointing(activation_checkpointing_kwargs), **kwargs
        )

    def _join_checkpointing(self, llm: nn.Module) -> None:
        """Where checkpointing was enabled before the LLM was wrapped: its settings stay, and the routing joins them.

        Not in reentrant checkpointing, see `gradient_checkpointing_enable`.
        """
        for module in llm.modules():
            function = vars(module).get("_gradient_checkpointing_func")
            settings = getattr(function, "keywords", {})
            there = settings.get("context_fn")  # perhaps of a tuner that was unloaded
            ours = there is None or isinstance(getattr(there, "__self__", None), RoutingContext)
            if function and settings.get("use_reentrant") is False and ours:
                joined = partial(function, context_fn=self.context.checkpoint_contexts)
                vars(module)["_gradient_checkpointing_func"] = joined

    def _checkpointing(self, given: dict[str, Any] | None) -> dict[str, Any]:
        settings = {"use_reentrant": False, **(given or {})}
        if not settings["use_reentrant"]:
            settings.setdefault("context_fn", self.context.checkpoint_contexts)
        return settings


register_method("moka", MokaConfig, MokaModel)
