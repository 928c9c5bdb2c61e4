"""Learning rates: one per part of the model, and the schedule that all of them follow.

rate(part, step) = base rate of the part * factor(step); the factor is transformers' own curve of `lr_scheduler_type`
(those that need no metric), used as a pure function of the step, so that a schedule has no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from data.schema import UserError

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter

    from mokamm.config_sections import TrainingConfig

Schedule = Callable[[int], float]
Parts = dict[str, "list[tuple[str, Parameter]]"]


def base_rates(training: TrainingConfig, parts: Iterable[str]) -> dict[str, float]:
    """The rate of each part: projectors have their own, everything else the common one."""
    common, own = training.learning_rate, training.projector_learning_rate
    assert common != "auto", "rate.resolve comes first"
    projector = common if own is None else own
    return {part: projector if part == "projector" else common for part in parts}


def moving(training: TrainingConfig, parts: Parts) -> Parts:
    """The parts whose rate is not 0; the others are frozen."""
    rates = base_rates(training, parts)
    for part in parts:
        if rates[part] == 0.0:
            for _, parameter in parts[part]:
                parameter.requires_grad_(False)
    return {part: named for part, named in parts.items() if rates[part] != 0.0}


def parameter_groups(training: TrainingConfig, parts: Parts) -> list[dict[str, Any]]:
    """Optimizer groups, each with its `part`. A part of rate 0 is frozen. Biases and norms (1-D) are not decayed."""
    groups: list[dict[str, Any]] = []
    parts = moving(training, parts)
    for part, rate in base_rates(training, parts).items():
        trained = [p for _, p in parts[part] if p.requires_grad]
        if training.weight_decay == 0.0:
            split = [(trained, 0.0)]
        else:
            matrices = [p for n, p in parts[part] if p.requires_grad and _is_matrix(n, p)]
            vectors = [p for n, p in parts[part] if p.requires_grad and not _is_matrix(n, p)]
            split = [(matrices, training.weight_decay), (vectors, 0.0)]
        groups += [
            {"params": members, "lr": rate, "base_lr": rate, "part": part, "weight_decay": decay}
            for members, decay in split
            if members
        ]
    if not groups:
        raise UserError(
            f"nothing to train: training.stage is {training.stage}, projector_learning_rate "
            f"{training.projector_learning_rate}; "
            "give the projectors a rate above 0, or choose an adapter.method that has parameters"
        )
    return groups


def dims(parameter: Parameter) -> int:
    """Dimensions of a parameter, also of one that ZeRO-3 has partitioned."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _is_matrix(name: str, parameter: Parameter) -> bool:
    """Also the kept entries of a LoRI-S's B, which stand in one dimension."""
    return dims(parameter) > 1 or name.endswith("_B.default.values")


def optimizer_arguments(training: TrainingConfig) -> dict[str, Any]:
    return {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}


def schedule(training: TrainingConfig, total_steps: int) -> Schedule:
    """factor(step) for the step numbered from 0. UserError where lr_scheduler_kwargs do not fit the type."""
    import torch
    from transformers import get_scheduler

    assert training.learning_rate != "auto", "rate.resolve comes first"
    # curves that end at a rate (min_lr, lr_end) ask the optimizer where they begin
    probe: torch.optim.Optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    warmup, kind = warmup_steps(training, total_steps), training.lr_scheduler_type
    try:
        return get_scheduler(kind, probe, warmup, total_steps, training.lr_scheduler_kwargs).lr_lambdas[0]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"training.lr_scheduler_kwargs do not fit training.lr_scheduler_type '{kind}': {error}"
        ) from None


def warmup_steps(training: TrainingConfig, total_steps: int) -> int:
    """Warm-up in steps: `warmup_steps` (a share where below 1), else the older `warmup_ratio`; as transformers has it."""
    steps = training.warmup_steps
    return int(steps) if steps >= 1 else in_steps(steps or training.warmup_ratio, total_steps)


def in_steps(every: float, total_steps: int) -> int:
    """A number of steps, from one or from a share of all (at most 1), rounded up as transformers does."""
    return math.ceil(every * total_steps) if isinstance(every, float) else every
