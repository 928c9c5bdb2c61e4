"""Which modules of an LLM an adapter goes on: names of a config to linear modules, or a refusal with the reason.

    match_targets       the linear modules that a config's target_modules mean, for every method alike
    match_parameters    the fused experts that its target_parameters mean
    name_whole_modules  the modules that train whole beside it (modules_to_save)
    unfit_modules       linear modules that no method can adapt, and why
    tuner_layers        every adapted module of a model

A name that matches nothing is answered with the nearest one.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Iterable
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from mokamm.routing import AdapterError

log = logging.getLogger("mokamm")

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
# the whole weight of a submodule where a class works with it; not its dtype, its shape, a slice, or what sets it
NOT_THE_WEIGHT = r"\s*(?:\[|=[^=]|is\b|\.(?:data|device|dtype|is_\w+|ndim|requires_grad|shape|size)\b)"
WHOLE_WEIGHT = re.compile(rf"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!{NOT_THE_WEIGHT})")
COMMENT = re.compile(r"#.*")
WIDTHS = ("in_features", "infeatures", "input_size")  # one of them in linear modules of other classes, quantised ones


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: `; did you mean 'x'? known: a, b`."""
    names = sorted(set(known))
    close = difflib.get_close_matches(str(name), names, n=1)
    return (f"; did you mean '{close[0]}'?" if close else ";") + f" known: {', '.join(names)}"


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that matches a module's name, whole or from a dot on, as PEFT's `alpha_pattern` does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear modules of a model; one that is wrapped already counts as itself, its insides do not.

    None of a module that another adapter trains whole: each adapter has a copy of it (`modules_to_save`).
    """
    names: list[str] = []
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside = name + "."
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or _linear_by_name(module)
        if isinstance(module, BaseTunerLayer):
            inside = name + "."
            names.append(name)
        elif linear and name:
            names.append(name)
    return names


def _linear_by_name(module: nn.Module) -> bool:
    """A quantised one or the like; not KimiLinearExperts, KimiLinearAttention, KimiLinearRMSNormGated, ..."""
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and weight.dim() == 2
    return "Linear" in type(module).__name__ and (plain or any(hasattr(module, name) for name in WIDTHS))


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Every adapted module by its name, of any PEFT method; those within another one belong to it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def unfit_modules(model: nn.Module) -> dict[str, str]:
    """Linear modules that no method can adapt, by name, and why."""
    modules, found = dict(model.named_modules()), {}
    for name in linear_names(model):
        path, _, last = name.rpartition(".")
        owner: Any = type(modules[path])
        if last in _weights_read(owner):
            found[name] = f"whose weight {owner.__name__} reads past any adapter"
        if not _gives_rows(modules[name]):
            found[name] = f"a {type(modules[name]).__name__}, which does not give one row of outputs for one of inputs"
    return found


@cache
def _weights_read(kind: Any) -> frozenset[str]:
    """Submodules whose weight a class multiplies by itself instead of calling them, as its source code says.

    A Mamba mixer hands `out_proj.weight` to a kernel, on a GPU in training alone, so that running it would not tell.
    """
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    methods = [method for base in bases for method in vars(base).items() if inspect.isfunction(method[1])]
    read: set[str] = set()
    for name, method in methods:
        if "init" not in name and "reset" not in name:
            try:
                read.update(WHOLE_WEIGHT.findall(COMMENT.sub("", inspect.getsource(method))))
            except OSError:  # its source is not there
                continue
    return frozenset(read)


def _gives_rows(module: nn.Module) -> bool:
    """False for a router, whose result is a choice, or a grouped product, although they are nn.Linear's by class.

    Tried on the meta device where an LLM's own code has overwritten the forward; FalconLinear is a plain product.
    """
    of_an_llm = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
    if not of_an_llm or not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    shapes = {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    named = [*module.named_parameters(), *module.named_buffers()]
    parameters = {name: torch.empty(shapes.get(name, tensor.shape), device="meta") for name, tensor in named}
    try:
        row = torch.func.functional_call(module, parameters, torch.empty(1, module.in_features, device="meta"))
    except Exception:  # of whatever kind that forward raises for one row
        return False
    return isinstance(row, Tensor) and row.shape == (1, module.out_features)


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the weights that hold all experts of a layer at once, (E, out, in): parameters, no linear modules."""
    names = []
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) == 3 and "experts" in name.split("."):
                names.append(f"{name}.{own}".replace(".base_layer", ""))
    return names


def ends_in(name: str, target: str) -> bool:
    """Whether a target is a module's or parameter's name, or the end of it from a dot on."""
    return f".{name}".endswith(f".{target}")


def short_name(fused: str) -> str:
    """A fused expert weight as a target names it: experts.down_proj."""
    return ".".join(fused.split(".")[-2:])


def match_parameters(model: nn.Module, config: Any) -> dict[str, list[str]]:
    """Which fused expert weights each of a config's `target_parameters` matches.

    Raises:
        AdapterError: one matches none (with the nearest), or dropout is asked for, which PEFT cannot give them.
    """
    names = fused_experts(model)
    found = {t: [n for n in names if ends_in(n, t)] for t in sorted(getattr(config, "target_parameters", None) or [])}
    for target, matched in found.items():
        if not matched:
            known = set(map(short_name, names))
            there = nearest(target, known) if known else ": this LLM has none"
            raise AdapterError(f"target_parameters: '{target}' matches no fused expert weight{there}")
    if found and config.lora_dropout:
        raise AdapterError(
            f"lora_dropout is {config.lora_dropout}: it must be 0 with target_parameters, since PEFT adds B A to the "
            "experts' weights as a whole, where their input cannot be dropped."
        )
    return found


def match_targets(model: nn.Module, config: Any, experts: bool = False) -> dict[str, list[str]]:
    """Which modules each target of a config matches; their names then stand in the config in the targets' place.

    `all-linear` leaves out the output head and what cannot be adapted, and is reported by the modules' last names
    (`q_proj`, ...). An empty list is allowed where `target_parameters` says what to adapt.

    experts: the method needs no routing, so that a module may see only some of a batch's tokens.

    Raises:
        AdapterError: a target matches no linear module, or one that cannot be adapted, or, unless allowed, an expert.
    """
    unfit = unfit_modules(model)
    found = _matches(model, config, unfit)
    if not found and not getattr(config, "target_parameters", None):
        raise AdapterError("target_modules is an empty list: name some modules, or leave it out for all-linear.")
    for target, matched in found.items():
        for name in matched:
            why, leave_out = unfit.get(name), rf".*\.{name.rpartition('.')[2]}"
            if not experts and "experts" in name.split("."):
                why, leave_out = "an expert that sees only some of a batch's tokens", r".*\.experts\..*"
            if why:
                raise AdapterError(
                    f"target_modules: '{target}' matches {name}, {why}. Leave such out: exclude_modules='{leave_out}'."
                )
    config.target_modules = {name for matched in found.values() for name in matched}
    return found


def _matches(model: nn.Module, config: Any, unfit: dict[str, str]) -> dict[str, list[str]]:
    """The linear modules of each target. Raises AdapterError where there are none."""
    targets, names = config.target_modules, _not_excluded(config, linear_names(model))
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        output = getattr(model, "get_output_embeddings", None)
        head = output() if callable(output) else None
        modules = dict(model.named_modules())
        names = [n for n in names if modules[n] is not head and n.rpartition(".")[2] != "lm_head" and n not in unfit]
        found: dict[str, list[str]] = {} if names else {"all-linear": []}
        for name in names:
            found.setdefault(name.rpartition(".")[2], []).append(name)
    elif isinstance(targets, str):
        found = {targets: [name for name in names if re.fullmatch(targets, name)]}
    else:
        found = {t: [name for name in names if ends_in(name, t)] for t in sorted(targets)}
    for target, matched in found.items():
        if not matched:
            known = {name.rpartition(".")[2] for name in names if name not in unfit}
            raise AdapterError(
                f"target_modules: '{target}' matches no linear module{_fused_hint(model, target)}{nearest(target, known)}"
            )
    return found


def _not_excluded(config: Any, names: list[str]) -> list[str]:
    """The names that `exclude_modules`, a regex or a list of names, leaves; a warning where one matches none.

    None of `modules_to_save`, which train whole (of a classifier PEFT names the head so), nor what is inside of them.
    """
    names = [name for name in names if not _lies_in(name, getattr(config, "modules_to_save", None) or [])]
    given = getattr(config, "exclude_modules", None) or []
    patterns = {given: given} if isinstance(given, str) else {entry: rf"(.*\.)?{re.escape(entry)}" for entry in given}
    left = names
    for entry, pattern in patterns.items():
        excluded = {name for name in names if re.fullmatch(pattern, name)}
        if not excluded and not config.inference_mode:
            known = {name.rpartition(".")[2] for name in names}
            log.warning("note: exclude_modules: '%s' matches no linear module%s", entry, nearest(entry, known))
        left = [name for name in left if name not in excluded]
    return left


def _lies_in(name: str, whole: list[str]) -> bool:
    """Whether a module is one that PEFT takes for one of `modules_to_save` (by the ends of their names), or inside of it."""
    return any(path.endswith(tuple(whole)) for path in accumulate(name.split("."), "{}.{}".format))


def name_whole_modules(model: nn.Module, config: Any) -> None:
    """Adds to `modules_to_save` the heads that PEFT trains for a task: for some tasks it names them after injection alone.

    Raises:
        AdapterError: an entry is no module of the model, lies in another one, or another adapter adapts what is in it.
    """
    heads = HEADS.get(config.task_type, ())
    given = [entry for entry in config.modules_to_save or [] if entry not in heads]
    names = [name for name, _ in model.named_modules()]
    for entry in given:
        if not any(name.endswith(entry) for name in names):
            known = {last for name in names if (last := name.rpartition(".")[2]) and not last.isdigit()}
            raise AdapterError(f"modules_to_save: '{entry}' matches no module{nearest(entry, known)}")
    whole = [*given, *heads]
    for name in names:
        if name.endswith(tuple(whole)) and _lies_in(
            name.rpartition(".")[0], whole
        ):  # PEFT would save what it cannot load
            raise AdapterError(f"modules_to_save: {name} lies in another of these modules; name the outer one alone.")
    config.modules_to_save = whole or None
    if adapted := [name for name in tuner_layers(model) if _lies_in(name, whole)]:
        raise AdapterError(
            f"modules_to_save: {adapted[0]} would train whole, and another adapter of this model adapts it. Leave it out of "
            "one of the two (exclude_modules of the other)."
        )


def _fused_hint(model: nn.Module, target: str) -> str:
    """For a target that names what is not linear modules but one fused weight."""
    fused = [
        n for n in fused_experts(model) if n.endswith("." + target) or "experts" in target or re.fullmatch(target, n)
    ]
    if not fused:
        return ""
    short = short_name(fused[0])
    return f", but the fused expert weight {fused[0]} (method lora adapts it: target_parameters=[{short}])"
