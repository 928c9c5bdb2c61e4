"""LoRI's adapters and masks between LORI_S, plain LoRA and the published forms; `mokamm convert` calls it.

Published LoRI (arXiv 2504.07448) is plain PEFT LoRA: LoRI-S is known by the zeros of its B. Some folders also hold rows of
embeddings for an added pad token, which never trained: they are left out with a warning, since a mokamm LLM gets no new
words. Published masks are pickled dictionaries from `...lora_B.default.weight` to bool tensors, read as weights only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.schema import UserError
from mokamm.adapter_folder import CONFIG, TENSORS, AdapterFolder, adapter_in, load_pickle
from mokamm.adapters import LoriConfig
from mokamm.adapters.masks import Mask, pack, unpack
from mokamm.adapters.peft_bridge import PREFIX, taken_for_experts
from mokamm.convert import Options, Plan
from mokamm.lori_mask import read_mask, write_mask
from mokamm.weights import share

MOSTLY_ZERO = 0.5  # share of B's entries from which on a LoRA is taken for a LoRI-S
COPIED = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "task_type", "base_model_name_or_path",
)  # fmt: skip


# ---- masks -----------------------------------------------------------------------------------------------------------


def plan_mask(source: Path, options: Options) -> Plan | None:
    if not source.is_file():
        return None
    if source.suffix != ".safetensors" and not _holds_masks(load_pickle(source, "a mask")):
        return None
    options.refuse_other("mask", source, "a mask")
    mask = any_mask(source)
    found = f"a mask of {len(mask.bits)} layers, {mask.kept:,} of {mask.total:,} entries kept (sparsity {mask.sparsity:.4f})"
    return Plan(found, "mask", lambda out: write_mask(mask, out, str(source)))


def _holds_masks(state: Any) -> bool:
    return isinstance(state, dict) and any(".lora_B" in str(key) for key in state)


def any_mask(path: Path) -> Mask:
    """A mask file of ours, or a published one. Raises UserError."""
    if path.suffix == ".safetensors":
        return read_mask(path)
    return published_mask(load_pickle(path, "a mask"), path)


def published_mask(state: Any, path: Path) -> Mask:
    """From {"...lora_B.default.weight": bool (out_features, r)}."""
    bits, shapes = {}, {}
    for key, kept in state.items() if isinstance(state, dict) else ():
        layer, found, _ = str(key).removeprefix(PREFIX).partition(".lora_B")
        if not found or not isinstance(kept, Tensor) or kept.dim() != 2 or not bool(((kept == 0) | (kept == 1)).all()):
            raise UserError(f"{path}: '{key}' is no mask of a lora_B (expected zeros and ones, out_features x r)")
        bits[layer], shapes[layer] = pack(kept.bool()), (int(kept.shape[0]), int(kept.shape[1]))
    if not bits:
        raise UserError(f"{path} holds no masks; expected a dictionary from ...lora_B.default.weight to bool tensors")
    return Mask(bits, shapes)


# ---- adapters --------------------------------------------------------------------------------------------------------


def plan_adapter(source: Path, options: Options) -> Plan | None:
    if (place := adapter_in(source)) is None:
        return None
    folder = AdapterFolder.open(place)
    if folder.kind == "MOKA":
        raise UserError(
            f"{source} is a MOKA adapter: its tokens take a path by their modality, which no LoRA can do. It loads with "
            "PeftModel.from_pretrained once mokamm.adapters is imported"
        )
    layers, warnings = folder.layers, folder.warnings
    total = sum(B[0] * B[1] for _, B in layers.values())
    kept = sum(int(folder.b(name).count_nonzero()) for name in layers)
    sparse = folder.kind == "LORI_S" or options.mask is not None or kept < (1 - MOSTLY_ZERO) * total
    what = "LORI_S" if folder.kind == "LORI_S" else "LoRA, known as LoRI-S by its zeros" if sparse else "LoRA"
    found = f"{what}: {len(layers)} layers, r {folder.config['r']}, {kept:,} of {total:,} entries of B are not zero"
    to = options.to or ("lori_s" if sparse and folder.kind == "LORA" else "lora")
    if options.mask is not None and (to, folder.kind) != ("lori_s", "LORA"):
        raise UserError(f"--mask makes a LORI_S of a LoRA; {source} is to become {to}, and is: {found}")
    if to == "mask":
        mask = folder.mask()
        return Plan(found, to, lambda out: write_mask(mask, out, str(source)), warnings)
    if to == "lora":
        model_type = base_type(folder)
        as_experts = [name for name in layers if name.rpartition(".")[2] in taken_for_experts(model_type)]
        if model_type is None and as_experts:
            warnings += [_base_unknown(folder)]
            as_experts = []
        return Plan(found, to, lambda out: write_lora(folder, out, as_experts), warnings)
    if folder.kind == "LORI_S":
        raise UserError(f"{source} is a LORI_S folder already")
    mask = folder.mask() if options.mask is None else any_mask(options.mask)
    if options.mask is not None:  # the adapter's own fits by construction
        mask.check({name: B for name, (_, B) in layers.items()})
        _check_zeros(folder, mask)
    return Plan(found, to, lambda out: write_lori_s(folder, mask, out), warnings)


def _check_zeros(folder: AdapterFolder, mask: Mask) -> None:
    for name, (_, shape) in folder.layers.items():
        kept = unpack(mask.bits[name], shape[0] * shape[1]).view(shape)
        if outside := int((folder.b(name)[~kept] != 0).sum()):
            raise UserError(f"the mask is not this adapter's: {outside} entries of {name}'s B outside it are not zero")


def base_type(folder: AdapterFolder) -> str | None:
    """The `model_type` of the adapter's LLM, where that is named and on this machine, or known to published_shapes.py."""
    from transformers import PretrainedConfig

    from mokamm.published_shapes import LLMS

    path = folder.config.get("base_model_name_or_path")
    if path in LLMS:
        return str(LLMS[path]["model_type"])
    try:
        return PretrainedConfig.get_config_dict(path, local_files_only=True)[0].get("model_type") if path else None
    except (OSError, ValueError):
        return None


def _base_unknown(folder: AdapterFolder) -> str:
    base = folder.config.get("base_model_name_or_path")
    return (
        f"the LLM of {folder.folder} is not on this machine ({base!r}). It does not matter for dense LLMs (Llama, Mistral, "
        "Qwen, ...); if it is a mixture of experts with dense or shared MLPs, PEFT alone would take these for the experts "
        "and load the result wrongly: import mokamm.adapters before it does"
    )


def write_lora(folder: AdapterFolder, out: Path, as_experts: list[str]) -> None:
    """A plain PEFT LoRA folder.

    as_experts: layers that PEFT would take for experts (`taken_for_experts`). As target_parameters it reads them right, with
    the same tensors; it has no dropout there.
    """
    from peft import LoraConfig

    if folder.kind == "LORA":
        config = {key: value for key, value in folder.config.items() if key != "auto_mapping"}
    else:
        assert folder.a_hash  # checked while it is computed
        config = LoraConfig(**{key: folder.config[key] for key in COPIED if key in folder.config}).to_dict()
        config["target_modules"] = sorted(folder.layers)  # all-linear would mean other modules to PEFT elsewhere
    if as_experts:
        config["target_modules"] = sorted(set(folder.layers) - set(as_experts))
        config["target_parameters"] = [f"{name}.weight" for name in sorted(as_experts)]
        config["lora_dropout"] = 0.0
    tensors = {}
    for name in folder.layers:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = folder.a(name)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = folder.b(name)
    _write(out, {**config, "inference_mode": True}, tensors)


def write_lori_s(folder: AdapterFolder, mask: Mask, out: Path) -> None:
    """A LORI_S folder with A stored, since no generator of ours drew it."""
    config = LoriConfig(**{key: folder.config[key] for key in COPIED if key in folder.config}, store_a=True).to_dict()
    config["target_modules"] = sorted(folder.layers)
    tensors = {}
    for name, (shape_a, shape_b) in folder.layers.items():
        A, B = f"{PREFIX}{name}.lori_A", f"{PREFIX}{name}.lori_B"
        tensors[f"{A}.weight"], tensors[f"{A}.shape"] = folder.a(name), torch.tensor(shape_a, dtype=torch.int32)
        tensors[f"{B}.mask"], tensors[f"{B}.shape"] = mask.bits[name], torch.tensor(shape_b, dtype=torch.int32)
        if len(values := folder.b(name).flatten()[unpack(mask.bits[name], shape_b[0] * shape_b[1])]):
            tensors[f"{B}.values"] = values
    _write(out, {**config, "inference_mode": True}, tensors)


def _write(out: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / TENSORS, metadata={"format": "pt"})
    share(out / TENSORS)
    lists = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (out / CONFIG).write_text(json.dumps(lists, indent=2, sort_keys=True))
