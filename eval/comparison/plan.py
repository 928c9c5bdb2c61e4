"""Which runs come next: a pure function of the configuration and of what is known so far.

For each method:   every rate of its grid, with the first `rate_seeds` seeds
                   --best validation--> a rate; where it is the lowest or the highest, the grid grows by one (`extend`)
                   --> the chosen rate with the other seeds --> the test split, once for each run at the chosen rate

A rate is as good as its worst seed's end: where one diverged (a step that could not be used, a loss that is no number),
the rate is not chosen. Where one failed (a crash, a full disk), none is chosen yet: the next start tries it again, and the
test split must not be answered at a rate that this could change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eval.comparison.settings import CompareConfig, MethodConfig, Run

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"  # how a run ended


@dataclass
class Outcome:
    """How a run ended. diverged: a result of its rate; failed: a mistake, a crash; it is tried again another time.

    validation: {"loss", "accuracy", "step", ...} of the weights that the run ended with.
    figures: trained_parameters, calibration_steps, step_seconds, memory_gb, checkpoint_bytes, adapter_bytes, seconds, ...
    """

    status: str
    reason: str = ""
    validation: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # of the run, to be compared with the plan's


Known = Mapping[Run, Outcome]


@dataclass(frozen=True)
class Stand:
    """Where a method stands. rates: its grid so far; chosen: the best rate; None while unknown (one failed, say).

    todo: trainings that can start now; later: trainings that will follow at least.
    end: at which end of the grid the chosen rate lies ("" inside); runs: those at the chosen rate, by seed.
    """

    rates: list[float]
    todo: list[Run]
    later: int = 0
    chosen: float | None = None
    end: Literal["", "lowest", "highest", "only"] = ""
    runs: list[Run] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        return not self.todo


def stand(config: CompareConfig, method: MethodConfig, known: Known) -> Stand:
    rates = config.grid(method)
    few, rest = config.seeds[: config.rate_seeds], config.seeds[config.rate_seeds :]
    for extensions_left in range(config.extend, -1, -1):
        todo = [run for rate in rates for seed in few if (run := Run(method.name, rate, seed)) not in known]
        if todo:
            return Stand(rates, todo, later=len(rest))
        failed = any(known[Run(method.name, rate, seed)].status == FAILED for rate in rates for seed in few)
        chosen = None if failed else best_rate(config, method, rates, known)
        if chosen is None:
            return Stand(rates, [])
        end = end_of(rates, chosen)
        if end in ("", "only") or not extensions_left:
            break
        rates = sorted([*rates, beyond(rates, end)])
    assert chosen is not None
    runs = [Run(method.name, chosen, seed) for seed in config.seeds]
    return Stand(rates, [run for run in runs if run not in known], 0, chosen, end, runs)


def best_rate(config: CompareConfig, method: MethodConfig, rates: list[float], known: Known) -> float | None:
    """The rate with the best mean over its seeds; between equals the other measure decides, then the lower rate."""

    def key(rate: float) -> tuple[float, float]:
        outcomes = [known[Run(method.name, rate, seed)] for seed in config.seeds[: config.rate_seeds]]
        if any(outcome.status != FINISHED for outcome in outcomes):
            return -math.inf, -math.inf
        loss = -sum(outcome.validation["loss"] for outcome in outcomes) / len(outcomes)
        accuracy = sum(outcome.validation["accuracy"] for outcome in outcomes) / len(outcomes)
        return (loss, accuracy) if config.choose_by == "loss" else (accuracy, loss)

    best = max(rates, key=key)  # the first of equals
    return best if key(best)[0] > -math.inf else None


def end_of(rates: list[float], chosen: float) -> Literal["", "lowest", "highest", "only"]:
    if len(rates) == 1:
        return "only"
    return "lowest" if chosen == rates[0] else "highest" if chosen == rates[-1] else ""


def beyond(rates: list[float], end: str) -> float:
    """The next rate after an end of the grid: as far away as the last two are from each other, in two digits."""
    last, before = (rates[0], rates[1]) if end == "lowest" else (rates[-1], rates[-2])
    return float(f"{last * last / before:.2g}")
