"""What adapters of ours refuse, each in one message: options outside their range, newer formats, quantized weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mokamm.adapters.peft_bridge import TunerLayer
from mokamm.routing import AdapterError

PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_lora_options(config: Any) -> None:
    """r, lora_alpha and lora_dropout of a config. Raises AdapterError."""
    if isinstance(config.r, bool) or not isinstance(config.r, int) or config.r < 1:
        raise AdapterError(f"r must be a whole number of at least 1; found {config.r!r}.")
    if not config.lora_alpha > 0:
        raise AdapterError(f"lora_alpha must be above 0; found {config.lora_alpha!r}.")
    if not 0.0 <= config.lora_dropout < 1.0:
        raise AdapterError(f"lora_dropout must be in [0, 1); found {config.lora_dropout!r}.")


def check_format(config: Any, known: int) -> None:
    """Raises AdapterError for an adapter that a newer mokamm has written."""
    if config.format_version > known:
        raise AdapterError(
            f"This {config.peft_type.value} adapter has format {config.format_version}, written by a newer mokamm; this one "
            f"reads up to format {known}. Update mokamm (git pull, then uv sync), or convert the adapter where it was made."
        )


def plain_weight(layer: TunerLayer, what: str, instead: str) -> Tensor:
    """The weight of a layer's base; AdapterError where it is not a plain, whole, floating-point matrix.

    what: the message's beginning, such as "The text path cannot be folded into"; instead: what to do, its end.
    """
    base = layer.get_base_layer()
    weight = cast(Tensor, base.weight)
    plain = type(weight.data) is Tensor and weight.dtype in PLAIN_DTYPES
    if not plain or sorted(weight.shape) != sorted((layer.in_features, layer.out_features)):
        raise AdapterError(
            f"{what} a {type(base).__name__} whose weight is {tuple(weight.shape)} {weight.dtype}: it is quantized or "
            f"sharded, and adding to it would round the update to nothing or miss parts. {instead}"
        )
    return weight
