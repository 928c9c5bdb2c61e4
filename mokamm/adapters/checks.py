"""What adapters of ours refuse, each in one message: options outside their range, newer formats, quantized weights;
and how the settings of a saved one differ from a model's."""

from __future__ import annotations

import math
import re
from typing import Any, cast

import torch
from torch import Tensor

from mokamm.adapters.peft_bridge import TunerLayer
from mokamm.routing import AdapterError

# PEFT's name -> the adapter section's
SHAPES = {"peft_type": "method", "r": "r", "modalities": "", "shared_b": "shared_b"}
MATHEMATICS = ("lora_alpha", "attention_weight", "attention_weight_pattern", "scale_logits", "logits_by_keys")
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_lora_options(config: Any) -> None:
    """r, lora_alpha, lora_dropout and the kind of modules_to_save of a config. Raises AdapterError."""
    if isinstance(config.r, bool) or not isinstance(config.r, int) or config.r < 1:
        raise AdapterError(f"r must be a whole number of at least 1; found {config.r!r}.")
    if not 0 < config.lora_alpha < math.inf:
        raise AdapterError(f"lora_alpha must be above 0 and finite; found {config.lora_alpha!r}.")
    if not 0.0 <= config.lora_dropout < 1.0:
        raise AdapterError(f"lora_dropout must be in [0, 1); found {config.lora_dropout!r}.")
    if isinstance(config.modules_to_save, str):  # PEFT would take it for a list of its letters
        raise AdapterError(f"modules_to_save must be a list of names; found {config.modules_to_save!r}.")


def check_attention_weights(weight: float, patterns: dict[str, float]) -> None:
    """A routed config's attention_weight and attention_weight_pattern. Raises AdapterError."""
    for pattern, value in {"": weight, **patterns}.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"attention_weight_pattern: '{pattern}' is no regular expression: {error}.") from error
        if not math.isfinite(value):
            where = f"attention_weight_pattern: that of '{pattern}'" if pattern else "attention_weight"
            raise AdapterError(f"{where} must be a finite number; found {value!r}.")


def check_format(config: Any, known: int) -> None:
    """Raises AdapterError for an adapter that a newer mokamm has written."""
    if isinstance(config.format_version, bool) or not isinstance(config.format_version, int):
        raise AdapterError(f"format_version must be a whole number; found {config.format_version!r}.")
    if config.format_version > known:
        raise AdapterError(
            f"This {config.peft_type.value} adapter has format {config.format_version}, written by a newer mokamm; this one "
            f"reads up to format {known}. Update mokamm (git pull, then uv sync), or convert the adapter where it was made."
        )


def other_settings(config: Any, saved: dict[str, Any]) -> list[str]:
    """What of an adapter_config.json is another adapter than the model's, or unknown here: it would compute otherwise."""
    own = {**vars(config), "peft_type": config.peft_type.value}
    problems = []
    for key, ours in SHAPES.items():
        if key in saved and key in own and saved[key] != own[key]:
            where = f" (adapter.{ours})" if ours else " (model.modalities)"
            problems.append(f"{key}: {saved[key]} there, {own[key]} in the configuration{where}")
    if saved.get("peft_type") == own["peft_type"]:
        problems += [
            f"{key}: {value!r} there, a setting that this version does not know; it was written by a newer one"
            for key, value in saved.items()
            if key not in own and value
        ]
    return problems


def other_mathematics(config: Any, saved: dict[str, Any]) -> list[str]:
    """Settings of the same shapes under which the adapter computes something else than it did where it was trained."""
    own = vars(config)
    return [
        f"{key}: {saved[key]} there, {own[key]} in the configuration (adapter.{key})"
        for key in MATHEMATICS
        if key in saved and key in own and saved[key] != own[key]
    ]


def plain_weight(layer: TunerLayer, what: str, instead: str) -> Tensor:
    """The weight of a layer's base; AdapterError where it is not a plain, whole, floating-point matrix.

    what: the message's beginning, such as "The text path cannot be folded into"; instead: what to do, its end.
    """
    base = layer.get_base_layer()
    weight = cast(Tensor, base.weight)
    if weight.is_meta:
        raise AdapterError(
            f"{what} a {type(base).__name__} whose weight is offloaded, or not loaded: on the meta device there is nothing "
            f"to add to. {instead}"
        )
    plain = type(weight.data) is Tensor and weight.dtype in PLAIN_DTYPES
    if not plain or sorted(weight.shape) != sorted((layer.in_features, layer.out_features)):
        raise AdapterError(
            f"{what} a {type(base).__name__} whose weight is {tuple(weight.shape)} {weight.dtype}: it is quantized or "
            f"sharded, and adding to it would round the update to nothing or miss parts. {instead}"
        )
    return weight
