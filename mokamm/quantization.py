"""A frozen LLM in 4 or 8 bits (bitsandbytes), under an adapter that is not: `model.llm.quantization`.

    4bit   NF4 with a second quantization of its scales (QLoRA, arXiv 2305.14314); 8bit   LLM.int8 (arXiv 2208.07339)

Linear layers are quantized while they are read; embeddings, norms and the output layer stay in `model.llm.dtype`, in
which the layers also compute. Adapters are added to the layers' outputs and train as ever; nothing can be added to the
weights themselves, so that folding and merging are refused. Works on a GPU; on a CPU too, slowly.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import torch

from data.schema import UserError
from mokamm.config import RunConfig, find_path
from mokamm.config_sections import LLMConfig


def quantized(llm: LLMConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told beside the rest; nothing for an LLM in full. Raises UserError without bitsandbytes."""
    if llm.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.llm.quantization is {llm.quantization}, which needs the package bitsandbytes: uv sync --extra "
            "quantization, or leave it out"
        )
    from transformers import BitsAndBytesConfig

    if llm.quantization == "8bit":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, llm.dtype),
        )
    return {"quantization_config": how, "device_map": {"": device}}


def check_trainable(config: RunConfig) -> None:
    """Raises UserError for an LLM whose weights have too few bits for how they are to be trained or sharded."""
    _check_sharding(config)
    if not config.training.deepspeed and config.method == "full" and config.model.llm.dtype != "float32":
        raise UserError(
            f"model.llm.dtype is {config.model.llm.dtype} and training.deepspeed null: method 'full' would update 16-bit "
            "weights, most of which a usual step leaves as they are. Set model.llm.dtype=float32 (training.bf16=true "
            "computes in bfloat16 all the same), or training.deepspeed, which keeps a float32 copy of them"
        )


def _check_sharding(config: RunConfig) -> None:
    """Raises UserError for a quantized LLM under ZeRO-3, which cuts weights up by their elements."""
    if config.model.llm.quantization is None or not config.training.deepspeed:
        return
    path = find_path(config.training.deepspeed)
    if json.loads(path.read_text()).get("zero_optimization", {}).get("stage") == 3:
        raise UserError(
            f"training.deepspeed: {path} is ZeRO-3, which cannot shard an LLM in {config.model.llm.quantization} "
            "(model.llm.quantization): use configs/deepspeed/zero2.json, or leave quantization out"
        )
