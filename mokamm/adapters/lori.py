"""LoRI-S as a PEFT method: LoRA with a frozen A and a B of which only the entries of a mask train (arXiv 2504.07448).

    h = W x + s B A x        s = alpha / r

    x --dropout--> A (frozen, remade from its seed)  --> z (.., r) --> B (values + mask, sparse_b.py) --> + W x

    model = get_peft_model(llm, LoriConfig(r=32, lora_alpha=64))
    model.base_model.set_mask(mask)                                # masks.py; before it there is nothing to train

LoRI-D, with a dense B, is plain LoRA with A frozen: `freeze_lora_a` makes one of PEFT's own LoRA, whose folders any PEFT
user loads. Cost: as LoRA in time, but x is not kept for the backward pass, because A has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig, PeftType
from torch import Tensor, nn

from mokamm.adapters.checks import check_format, check_lora_options, plain_weight
from mokamm.adapters.frozen_a import VERSION, draw
from mokamm.adapters.frozen_tuner import FrozenATuner, new_a, new_b
from mokamm.adapters.peft_bridge import TunerLayer, freeze, register_method
from mokamm.adapters.sparse_b import dense_weight
from mokamm.routing import AdapterError

FORMAT = 1
UNMERGED = "Use the adapter unmerged, or load the LLM unquantized and whole."


@dataclass
class LoriConfig(PeftConfig):
    """Configuration of LoRI-S. Raises AdapterError for a value outside its range, or a newer format."""

    r: int = field(default=32, metadata={"help": "rank of A and B"})
    lora_alpha: float = field(default=64, metadata={"help": "the update is scaled by s = lora_alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input, in training"})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "names, a regex, or all-linear (without the output head)"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names or a regex left out"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "whole modules that train and are saved beside the adapter, such as a new head"}
    )
    a_seed: int = field(default=0, metadata={"help": "A is drawn from it"})
    a_version: int = field(default=VERSION, metadata={"help": "of the generator that draws A"})
    a_hash: str | None = field(default=None, metadata={"help": "sha256 of A, set when the model is wrapped"})
    store_a: bool = field(default=False, metadata={"help": "write A into the file instead of remaking it"})
    format_version: int = FORMAT

    frozen_a: ClassVar[bool] = True
    sparse_b: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LORI_S")
        check_format(self, FORMAT)
        check_lora_options(self)


class LoriLinear(TunerLayer):
    """A frozen linear module with one or more LoRI-S adapters."""

    adapter_layer_names = ("lori_A", "lori_B")
    other_param_names = ("scaling", "lori_dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.scaling: dict[str, float] = {}
        self.lori_dropout, self.lori_A, self.lori_B = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    def add_adapter(self, name: str, config: LoriConfig, key: str) -> None:
        self.scaling[name] = config.lora_alpha / config.r
        self.lori_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lori_A[name] = new_a(self, config.r, config, key)
        self.lori_B[name] = new_b(self, config.r, config)
        self.place(name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        h = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return h
        out = h
        for name in self.active_adapters:
            if name in self.lori_A:
                A = cast(nn.Linear, self.lori_A[name])
                z = A(self.lori_dropout[name](self._cast_input_dtype(x, A.weight.dtype)))
                out = out + self.lori_B[name](z * self.scaling[name])
        return out.to(h.dtype)

    # -- merging: W + s B A, plain addition --

    def get_delta_weight(self, name: str) -> Tensor:
        """s B A in the dtype of the adapter, laid out like W."""
        A = cast(nn.Linear, self.lori_A[name]).weight.detach()
        delta = (dense_weight(self.lori_B[name]).to(A.dtype) @ A) * self.scaling[name]
        return delta.T if self.weight_is_transposed else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to W. Raises AdapterError where W is quantized or sharded, or (safe_merge) becomes infinite."""
        for name in self.to_merge(adapter_names):
            if name in self.lori_A:
                weight = plain_weight(self, "The adapter cannot be merged into", UNMERGED)
                merged = weight + self.get_delta_weight(name).to(weight.dtype)
                if safe_merge and not bool(torch.isfinite(merged).all()):
                    raise AdapterError(f"Merging '{name}' gives weights that are not finite; nothing was changed.")
                weight.copy_(merged)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapters out again; rounding stays behind, as with PEFT's LoRA."""
        while self.merged_adapters:
            weight = plain_weight(self, "The adapter cannot be taken out of", UNMERGED)
            weight.sub_(self.get_delta_weight(self.merged_adapters.pop()).to(weight.dtype))


class LoriModel(FrozenATuner):
    """The tuner of LoRI-S."""

    prefix = "lori_"
    tuner_layer_cls = LoriLinear
    factors = ("lori_A", "lori_B")

    def new_layer(self, target: nn.Module) -> LoriLinear:
        return LoriLinear(target)


@torch.no_grad()
def freeze_lora_a(model: nn.Module, seed: int, adapter_name: str = "default") -> None:
    """Makes a LoRA of PEFT's a LoRI-D: every A drawn from the seed, as LoRI-S has it, and frozen."""
    base = cast(Any, model).base_model.model
    for name, layer in base.named_modules():
        if adapter_name in getattr(layer, "lora_A", ()):
            A = layer.lora_A[adapter_name].weight
            if not A.is_meta:
                A.copy_(draw(name, tuple(A.shape), seed))
            freeze(layer, adapter_name, "lora_A")


register_method("lori_s", LoriConfig, LoriModel)
