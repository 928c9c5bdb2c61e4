"""Going on from an existing adapter (continual learning of LoRI: first safety, then a task, arXiv 2504.07448).

    adopt_a(model, source)     A as the source has it; stored from then on, where our generator would draw another
    set_mask(...)              of the new task, on a LoRI-S
    start_b(model, source)     B as the source has it: under the mask it trains on, outside it stays (SparseB.start)

A mask belongs to one A: whoever trains a LoRI-D to cut a mask for going on from an adapter adopts its A alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mokamm.adapters.checks import other_mathematics, other_settings
from mokamm.adapters.frozen_a import digest
from mokamm.adapters.masks import Shape
from mokamm.adapters.sparse_b import SparseB, dense_weight
from mokamm.routing import AdapterError

log = logging.getLogger("mokamm")

FACTORS = (("lora_A", "lora_B"), ("lori_A", "lori_B"), ("moka_A", "moka_B"))


@dataclass(frozen=True)
class Source:
    """An existing adapter. what: its name in messages; shapes: of A and B by layer; scaling: alpha / r; settings: of its
    adapter_config.json."""

    what: str
    shapes: dict[str, tuple[Shape, Shape]]
    scaling: float
    a: Callable[[str], Tensor]
    b: Callable[[str], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


def factors(model: Any, adapter_name: str = "default") -> dict[str, tuple[nn.Linear, nn.Module]]:
    """The A and B of every adapted layer of a PeftModel with LoRA, LORI_S or MOKA, by the layers' names in the LLM."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        for a, b in FACTORS:
            if adapter_name in getattr(layer, a, ()):
                found[name] = (getattr(layer, a)[adapter_name], getattr(layer, b)[adapter_name])
    return found


def a_digest(model: Any, adapter_name: str = "default") -> str:
    """The hash of a model's A, as configs and masks record it."""
    return digest((name, A.weight) for name, (A, _) in factors(model, adapter_name).items())


@torch.no_grad()
def adopt_a(model: Any, source: Source, adapter_name: str = "default") -> None:
    """Raises AdapterError where the source has other layers, shapes, modalities or another scaling; warns where it computed
    something else with them."""
    own, config = factors(model, adapter_name), model.peft_config[adapter_name]
    settings = dict(source.settings)
    if settings.get("peft_type") != config.peft_type or "format_version" not in settings:
        settings.pop("peft_type", None)  # a LoRI-S may begin at a LoRI-D; what PEFT's own folders say is PEFT's matter
    problems = other_settings(config, settings)
    problems += [f"{name} is adapted here and not there" for name in own if name not in source.shapes]
    problems += [f"{name} is adapted there and not here" for name in source.shapes if name not in own]
    for name, (A, B) in own.items():
        here = (tuple(A.weight.shape), (int(B.out_features), int(B.in_features)))  # type: ignore[arg-type]
        if name in source.shapes and source.shapes[name] != here:
            problems.append(f"{name}: A and B are {source.shapes[name]} there and {here} here")
    if source.scaling != config.lora_alpha / config.r:
        problems.append(f"lora_alpha / r is {source.scaling:g} there and {config.lora_alpha / config.r:g} here")
    if problems:
        more = [f"... and {len(problems) - 4} more"] if len(problems) > 4 else []
        raise AdapterError("\n  - ".join([f"{source.what} cannot be gone on from:", *problems[:4], *more]))
    for line in other_mathematics(config, settings):
        log.warning("note: %s was trained with another %s", source.what, line)
    there = {name: source.a(name) for name in own}
    if digest(there.items()) == a_digest(model, adapter_name):
        return
    for name, (A, _) in own.items():
        A.weight.copy_(there[name])
    if hasattr(config, "store_a"):
        config.store_a, config.a_hash = True, None


@torch.no_grad()
def start_b(model: Any, source: Source, adapter_name: str = "default") -> None:
    """B begins as the source's; after `adopt_a`, and after a sparse B's mask is set."""
    for name, (_, B) in factors(model, adapter_name).items():
        if isinstance(B, SparseB):
            B.start(source.b(name).to(B.device))
        else:
            dense_weight(B).copy_(source.b(name))
