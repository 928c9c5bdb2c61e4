"""What came out of a comparison: from the runs' outcomes and predictions to one JSON tree.

{"config": {...}, "run_config": {...}, "machine": {...}, "reference": name, "benchmarks": {name: measure}, "methods": [
    {"name", "group", "overrides", "rates": [{"rate", "runs": [{"seed", "status", "reason", "loss", "accuracy"}]}],
     "chosen": rate | null, "end": "" | "lowest" | "highest" | "only",
     "trained_parameters", "projector_parameters", "calibration_steps", "step_seconds", "memory_gb", "checkpoint_bytes",
     "adapter_bytes", "seconds", "threads", "jobs",
     "runs": [{"seed", "status", "reason", "figures", "scores": {benchmark: share}}],
     "benchmarks": {name: {"mean", "interval", "with_seeds", "seeds": [share], "difference": {"mean", "lower_is_better",
                           "interval", "p_clips", "p_methods", "p_clips_holm", "p_methods_holm"} | null}}}]}

Shares lie between 0 and 1. Holm's family is all tests of the comparison: every method but the reference, on every
benchmark. Figures of a method are those of its runs at the chosen rate: the median of step times, the greatest peak.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from data.schema import UserError
from eval.benchmarks import find_benchmark
from eval.comparison.differences import Array, Estimate, difference, holm, score, sign_flips
from eval.comparison.plan import Outcome, stand
from eval.comparison.progress import Progress
from eval.comparison.settings import MethodConfig, Run
from mokamm.machine import installed, processors

LIBRARIES = ("mokamm", "torch", "transformers", "peft", "numpy")
Tree = dict[str, Any]


class Points:
    """What the runs earned on one benchmark: a table of seeds x units, the same units for all methods."""

    def __init__(self, lower_is_better: bool = False) -> None:
        self.lower_is_better = lower_is_better
        self.units: list[str] = []
        self.of_U: Array = np.zeros(0)
        self.rows: list[tuple[str, float]] = []  # (unit, to be earned) of every row, equal for all runs

    def read(self, path: Path) -> Array:
        """Points by unit of one run's predictions. Raises UserError where its rows are not those of the other runs."""
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 in an answer
        found = [json.loads(line) for line in lines if line]
        rows = [(str(row["unit"]), float(row["of"])) for row in found]
        if not self.rows:
            self.rows = rows
            self.units = sorted({unit for unit, _ in rows})
            self.of_U = self._by_unit(rows, [of for _, of in rows])
        if rows != self.rows:
            raise UserError(
                f"{path} answers other rows than the other runs did; only runs on the same rows can be compared. Delete "
                f"{path.parent} and start the same command again"
            )
        return self._by_unit(rows, [float(row["points"]) for row in found])

    def _by_unit(self, rows: list[tuple[str, float]], values: list[float]) -> Array:
        place = {unit: i for i, unit in enumerate(self.units)}
        totals = np.bincount([place[unit] for unit, _ in rows], weights=values, minlength=len(self.units))
        return totals.astype(np.float64)


def gather(progress: Progress) -> Tree:
    """Everything that is known, of all methods; a method that is not ready yet has what there is."""
    comparison, config = progress.comparison, progress.comparison.config
    plain = comparison.run_config(comparison.any_run())
    tables: dict[str, Points] = {
        name: Points(find_benchmark(benchmark).lower_is_better) for name, benchmark in comparison.benchmarks.items()
    }
    earned: dict[tuple[str, str], Array] = {}
    methods = []
    for method in config.methods.values():
        tree, points = _method(progress, method, tables)
        methods.append(tree)
        earned.update({(method.name, name): found for name, found in points.items()})
    _compare(methods, earned, tables, config.reference)
    return {
        "config": config.model_dump(mode="json"),
        "run_config": {key: value for key, value in plain.to_dict().items() if key != "versions"},
        "machine": _machine(plain.training.use_cpu),
        "reference": config.reference,
        "benchmarks": {name: find_benchmark(benchmark).measure for name, benchmark in comparison.benchmarks.items()},
        "methods": methods,
    }


def _machine(use_cpu: bool | None) -> Tree:
    import torch

    machine = {"processor": next(iter(processors()), platform.processor()), "cores": len(os.sched_getaffinity(0))}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() and not use_cpu else {}
    return {**machine, **gpu, "python": platform.python_version(), **installed(LIBRARIES)}


# ---- a method --------------------------------------------------------------------------------------------------------


def _method(progress: Progress, method: MethodConfig, tables: dict[str, Points]) -> tuple[Tree, dict[str, Array]]:
    """Its tree, and its points (seeds x units) by benchmark."""
    comparison, config = progress.comparison, progress.comparison.config
    found = stand(config, method, progress.known)
    scored = [run for run in found.runs if progress.finished(run) and progress.scored(run)]
    points: dict[str, Array] = {}
    for name, table in tables.items():
        rows = [table.read(run.folder(comparison.out) / "predictions" / f"{name}.jsonl") for run in scored]
        if rows:
            points[name] = np.stack(rows)
    figures = [progress.known[run].figures for run in filter(progress.finished, found.runs)]
    tree = {
        "name": method.name,
        "group": method.group,
        "overrides": method.overrides,
        "rates": [_rate(progress, method, rate) for rate in found.rates],
        "chosen": found.chosen,
        "end": found.end,
        **_figures(figures),
        "runs": [_run(progress, run) for run in found.runs],
        "benchmarks": {name: _scores(rows, tables[name]) for name, rows in points.items()},
    }
    return tree, points


def _rate(progress: Progress, method: MethodConfig, rate: float) -> Tree:
    """What validation said of a rate, with every seed that was run there."""
    runs = [run for seed in progress.comparison.config.seeds if (run := Run(method.name, rate, seed)) in progress.known]
    return {"rate": rate, "runs": [{"seed": run.seed, **_validated(progress.known[run])} for run in runs]}


def _validated(outcome: Outcome) -> Tree:
    found = outcome.validation
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "loss": found.get("loss"),
        "accuracy": found.get("accuracy"),
    }


def _figures(figures: list[Tree]) -> Tree:
    if not figures:
        return {}
    parts = figures[0]["trained_parameters"]
    return {
        "trained_parameters": sum(count for part, count in parts.items() if part != "projector"),
        "projector_parameters": parts.get("projector", 0),
        "calibration_steps": figures[0].get("calibration_steps", 0),  # which an older version did not note
        "step_seconds": _median([f["step_seconds"] for f in figures]),
        "memory_gb": max(f["memory_gb"] for f in figures),
        "checkpoint_bytes": figures[0]["checkpoint_bytes"],
        "adapter_bytes": figures[0]["adapter_bytes"],
        "seconds": _median([f["seconds"] for f in figures]),
        "threads": figures[0]["threads"],
        "jobs": max(f["jobs"] for f in figures),
    }


def _median(values: list[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _run(progress: Progress, run: Run) -> Tree:
    outcome = progress.known.get(run)
    if outcome is None:
        return {"seed": run.seed, "status": "to do"}
    tree: Tree = {
        "seed": run.seed,
        "status": outcome.status,
        "reason": outcome.reason,
        "figures": outcome.figures,
        "scores": {},
    }
    if progress.finished(run) and progress.scored(run):
        folder = run.folder(progress.comparison.out) / "predictions"
        tree["scores"] = {
            path.name.removesuffix(".metrics.json"): json.loads(path.read_text())["score"]
            for path in sorted(folder.glob("*.metrics.json"))
        }
    return tree


def _scores(points_SU: Array, table: Points) -> Tree:
    found = score(points_SU, table.of_U)
    seeds = (points_SU.sum(1) / table.of_U.sum()).tolist()
    return {"mean": found.mean, "interval": found.interval, "with_seeds": found.with_seeds, "seeds": seeds}


# ---- against the reference -------------------------------------------------------------------------------------------


def _compare(methods: list[Tree], earned: dict[tuple[str, str], Array], tables: dict[str, Points], ref: str) -> None:
    """Add `difference` to every method's benchmarks, p-values corrected over all of them."""
    tests: list[Tree] = []
    for method in methods:
        for name, found in method["benchmarks"].items():
            found["difference"] = None
            if method["name"] == ref or (ref, name) not in earned:
                continue
            own, other, of_U = earned[method["name"], name], earned[ref, name], tables[name].of_U
            estimate: Estimate = difference(own, other, of_U)
            found["difference"] = {
                "mean": estimate.mean,
                "lower_is_better": tables[name].lower_is_better,
                "interval": estimate.interval,
                "p_clips": sign_flips(own.mean(0) - other.mean(0)),
                "p_methods": estimate.p if estimate.with_seeds else None,
            }
            tests.append(found["difference"])
    for kind in ("p_clips", "p_methods"):
        for test, corrected in zip(tests, holm([test[kind] for test in tests]), strict=True):
            test[f"{kind}_holm"] = corrected
