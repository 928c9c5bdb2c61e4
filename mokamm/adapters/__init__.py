"""Adapters for the LLM, by name: importing this package makes `MOKA` known to PEFT.

    model = wrap(llm, "moka", ["text", "vision", "audio"], {"r": 4, "lora_alpha": 16})
    set_routing(model, Routing(modality_ids, key_mask))      # does nothing for methods without routing

A method is one function (LLM, modalities, options) -> model and one line in METHODS. One `adapter:` section of a config
serves all methods: an option that a method has no use for is accepted, one that no method knows is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from peft import HiraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from mokamm.adapters.coto import Coto
from mokamm.adapters.frozen_tuner import FrozenATuner, check_same_a
from mokamm.adapters.hira import use_one_matmul
from mokamm.adapters.lori import LoriConfig, LoriModel, freeze_lora_a
from mokamm.adapters.masks import Mask
from mokamm.adapters.peft_bridge import check_adapter_name, taken_for_experts
from mokamm.adapters.routed import MokaConfig, MokaModel, RoutedLinear
from mokamm.adapters.targets import ends_in, fused_experts, match_parameters, match_targets, nearest, short_name
from mokamm.routing import AdapterError, Routing

__all__ = [
    "METHODS",
    "AdapterError",
    "Coto",
    "LoriConfig",
    "LoriModel",
    "Mask",
    "MokaConfig",
    "MokaModel",
    "RoutedLinear",
    "Routing",
    "fit",
    "fused_experts",
    "set_routing",
    "target_report",
    "wrap",
]

log = logging.getLogger("mokamm")

LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules")
ATTENTION_OPTIONS = ("attention_weight", "attention_weight_pattern", "scale_logits", "logits_by_keys", "shared_b")
FROZEN_A_OPTIONS = ("a_seed", "store_a")
MOKA_OPTIONS = (*LORA_OPTIONS, *ATTENTION_OPTIONS, "frozen_a", *FROZEN_A_OPTIONS)
EXPERT_OPTIONS = ("target_parameters",)  # fused expert weights; of the methods below that train something else than all
EXPERT_METHODS = ("lora", "full", "none")
HIRA_OPTIONS = ("one_matmul",)
OPTIONS = (*MOKA_OPTIONS, *EXPERT_OPTIONS, *HIRA_OPTIONS)
# of the processor, the training loop and the run, in the same section of a config
LORI_RUN_OPTIONS = ("sparsity", "mask", "calibration_share", "calibration_learning_rate", "init_from", "init_a_only")
OTHER_OPTIONS = ("keys", "coto", "stochastic_depth", *LORI_RUN_OPTIONS)


def _moka(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    config = MokaConfig(task_type="CAUSAL_LM", modalities=modalities, **_pick(options, MOKA_OPTIONS))
    return get_peft_model(llm, config)


def _multi_lora(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """One whole LoRA per modality, without attention."""
    picked = _pick(options, (*LORA_OPTIONS, "frozen_a", *FROZEN_A_OPTIONS))
    config = MokaConfig(task_type="CAUSAL_LM", modalities=modalities, shared_b=False, attention_weight=0.0, **picked)
    return get_peft_model(llm, config)


def _lora(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """PEFT's LoRA: every token through one pair, whatever its modality."""
    options_of_experts = _pick(options, EXPERT_OPTIONS)
    return _wrap_by_peft(llm, LoraConfig(task_type="CAUSAL_LM", **_common(modalities, options), **options_of_experts))


def _dora(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """PEFT's DoRA: LoRA's direction, and the length of each row of W + s B A trained apart."""
    return _wrap_by_peft(llm, LoraConfig(task_type="CAUSAL_LM", use_dora=True, **_common(modalities, options)))


def _hira(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """PEFT's HiRA, W' = W * (1 + B A), in one matmul; `one_matmul=False` leaves it PEFT's two. It has no alpha."""
    common = _common(modalities, options)
    del common["lora_alpha"]
    config = HiraConfig(task_type="CAUSAL_LM", hira_dropout=common.pop("lora_dropout"), **common)
    model = _wrap_by_peft(llm, config)
    return model if options.get("one_matmul") is False else use_one_matmul(model)


def _common(modalities: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """LORA_OPTIONS under the checks and defaults that all methods share."""
    checked = MokaConfig(modalities=modalities, **_pick(options, LORA_OPTIONS))
    return {name: getattr(checked, name) for name in LORA_OPTIONS}


def _wrap_by_peft(llm: nn.Module, config: PeftConfig) -> nn.Module:
    """A method of PEFT's own, under the same checks of names and targets, and with the same report, as ours."""
    check_adapter_name(llm, "default")
    found = match_targets(llm, config, experts=True) | match_parameters(llm, config)
    model = get_peft_model(llm, config)
    vars(model.base_model)["target_report"] = {"default": {target: len(names) for target, names in found.items()}}
    if isinstance(config, LoraConfig):
        _tell_of_peft_alone(llm, config)
    return model


def _lori_d(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """LoRA with A frozen, drawn from `a_seed`."""
    model = _lora(llm, modalities, options)
    freeze_lora_a(model, options.get("a_seed") or 0)
    return model


def _lori_s(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """LoRA with A frozen and B sparse; it trains once `model.base_model.set_mask(mask)` is called."""
    return get_peft_model(llm, LoriConfig(task_type="CAUSAL_LM", **_pick(options, (*LORA_OPTIONS, *FROZEN_A_OPTIONS))))


def _lori_moka_d(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """MokA with every A frozen."""
    return _moka(llm, modalities, {**options, "frozen_a": True})


def _lori_moka_s(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """MokA with every A frozen and B sparse, waiting for its mask as `_lori_s` does."""
    picked = _pick(options, (*LORA_OPTIONS, *ATTENTION_OPTIONS, *FROZEN_A_OPTIONS))
    config = MokaConfig(task_type="CAUSAL_LM", modalities=modalities, frozen_a=True, sparse_b=True, **picked)
    return get_peft_model(llm, config)


def _full(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """Full fine-tuning: every parameter trains."""
    return llm.requires_grad_(True)


def _none(llm: nn.Module, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """The LLM as it is, frozen (stage 1 trains the projectors alone)."""
    return llm.requires_grad_(False)


METHODS: dict[str, Callable[[nn.Module, list[str], dict[str, Any]], nn.Module]] = {
    "moka": _moka,
    "multi_lora": _multi_lora,
    "lora": _lora,
    "dora": _dora,
    "hira": _hira,
    "lori_d": _lori_d,
    "lori_s": _lori_s,
    "lori_moka_d": _lori_moka_d,
    "lori_moka_s": _lori_moka_s,
    "full": _full,
    "none": _none,
}


def wrap(llm: nn.Module, method: str, modalities: list[str], options: dict[str, Any]) -> nn.Module:
    """The LLM made trainable by a method of METHODS, in place.

    Args:
        llm: any AutoModelForCausalLM (wrap the LLM, not a composite: its encoders' layers have the same names).
        method: a name in METHODS.
        modalities: the modalities in the order of their ids; `text` is put first where it is not named.
        options: the config's `adapter` section, without `method`; None stands for the method's own default.

    Raises:
        AdapterError: an unknown method, option or target (with the nearest known one), or a value outside its range.
    """
    if method not in METHODS:
        raise AdapterError(f"Unknown adapter method '{method}'{nearest(method, METHODS)}")
    known = (*OPTIONS, *OTHER_OPTIONS)
    for name in options:
        if name not in known:
            raise AdapterError(f"Unknown adapter option '{name}'{nearest(name, known)}")
    if options.get("target_parameters") and method not in EXPERT_METHODS:
        raise AdapterError(
            f"target_parameters: method '{method}' cannot adapt fused expert weights: its layers wrap linear modules, and "
            "a routed one must see all tokens of a batch in order, of which an expert gets only some. Leave "
            "target_parameters out (attention and shared layers are adapted), or choose adapter.method=lora."
        )
    names = list(modalities) if "text" in modalities else ["text", *modalities]
    if method not in ("full", "none"):
        _tell_of_experts(fused_experts(llm), method, options.get("target_parameters") or [])
    return METHODS[method](llm, names, options)


def _tell_of_experts(fused: list[str], method: str, targets: list[str]) -> None:
    """A warning where fused experts, most of a model's weights, are left as they are: no target of modules names them."""
    left = {name for name in fused if not any(ends_in(name, t) for t in targets)}
    if not left:
        return
    names = ", ".join(sorted(set(map(short_name, left))))
    how = f"adapter.target_parameters=[{names}] adapts them"
    log.warning(
        "note: the experts (%s) are not adapted, only linear layers are; %s",
        names,
        how if method in EXPERT_METHODS else f"method {method} cannot, with adapter.method=lora {how}",
    )


def _tell_of_peft_alone(llm: Any, config: LoraConfig) -> None:
    """A warning where PEFT, reading this adapter's folder without mokamm, would adapt experts in place of dense MLPs."""
    last_names = {name.rpartition(".")[2] for name in config.target_modules or ()}
    taken = last_names & taken_for_experts(getattr(getattr(llm, "config", None), "model_type", ""))
    if taken:
        log.warning(
            "note: PEFT alone would take %s of this LLM for its experts and load the adapter wrongly: import "
            "mokamm.adapters before it does%s",
            ", ".join(sorted(taken)),
            "" if config.use_dora else ", or let mokamm convert write a folder that it loads as it is",
        )


def fit(model: nn.Module, folder: Path, state: dict[str, Any]) -> None:
    """Make a PeftModel ready for the tensors of an adapter's folder: a sparse B takes the masks from there.

    Raises:
        AdapterError: the folder was written by a newer mokamm, or its A is not this model's.
    """
    tuner = cast(Any, model).base_model
    if isinstance(tuner, FrozenATuner):
        config = cast(Any, tuner.peft_config["default"])
        check_same_a(config, PeftConfig.from_pretrained(str(folder)))
        tuner.before_load(model, config, "default", dict(state))


def set_routing(model: nn.Module, routing: Routing | None) -> None:
    """Sets the routing of every routed adapter inside a model; does nothing where there is none."""
    for module in model.modules():
        if isinstance(module, MokaModel):
            module.set_routing(routing)


def target_report(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """How many modules each target of an adapter matched; empty for methods that wrap nothing."""
    for module in model.modules():
        report = vars(module).get("target_report")
        if report is not None:
            return report.get(adapter_name, {})
    return {}


def _pick(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options of these names that are set; None means the method's own default."""
    return {name: options[name] for name in names if options.get(name) is not None}
