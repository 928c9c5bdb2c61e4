"""The report of a comparison: report.md with its plots, and results.json, from the tree that results.gather made.

Nothing is measured here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.comparison.plan import FAILED
from eval.comparison.plots import mean_over_seeds, plot_parameters, plot_rates

Tree = dict[str, Any]
RATES = "Grey: the reference. A ring: the chosen rate. A cross: a rate that some seed diverged or failed at."
ENDS = {"": "", "lowest": " ↓", "highest": " ↑", "only": " ="}


def write_report(results: Tree, folder: Path) -> Path:
    """Write all files and return the path of report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    plot_rates(results, folder / "rates.png")
    plot_parameters(results, folder / "parameters.png")
    (folder / "report.md").write_text("\n".join(page(results)) + "\n")
    return folder / "report.md"


# ---- Markdown --------------------------------------------------------------------------------------------------------


def page(results: Tree) -> list[str]:
    config, run, machine = results["config"], results["run_config"], results["machine"]
    steps = run["training"]["max_steps"]
    length = f"{steps} steps" if steps > 0 else f"{run['training']['num_train_epochs']:g} epochs"
    batch = run["training"]["per_device_train_batch_size"] * run["training"]["gradient_accumulation_steps"]
    lines = ["# Comparison of methods", ""]
    lines += [
        f"Every run: `{config['base']}`, {length} of {batch} rows. Rates chosen by validation {config['choose_by']} "
        f"({config['rate_seeds']} seed{'s' if config['rate_seeds'] > 1 else ''} a rate), then seeds "
        f"{', '.join(map(str, config['seeds']))} at the chosen rate; the test split was answered by those runs only.",
        "",
        *_first_phases(results),
    ]
    for name, measure in results["benchmarks"].items():
        lines += [f"## {name}: {measure}, test split", "", *score_table(results, name), ""]
    lines += [*_legend(results), "", "![rates](rates.png)", "", RATES, "", "![parameters](parameters.png)", ""]
    lines += ["## Costs", "", *cost_table(results), ""]
    lines += [
        "Step time: median over the stretches between two log lines, the first left out, then over seeds. Memory: "
        "greatest peak of a run, of the GPU's where one is named below, else of its process, Python and libraries "
        "included. Run: median over seeds, of runs that were never stopped. Sizes: the adapter (or the LLM) of `final/`, "
        "and a whole checkpoint with projectors and optimizer."
    ]
    lines += ["", "## Validation at every rate", "", *rate_table(results), ""]
    lines += [f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items())}. {_processes(results)}"]
    return lines


def _first_phases(results: Tree) -> list[str]:
    """What some methods train before the steps that all have."""
    found = [f"{m['name']} {m['calibration_steps']}" for m in results["methods"] if m.get("calibration_steps")]
    if not found:
        return []
    told = f"Steps before these, for the mask alone (LoRI's first phase): {', '.join(found)}."
    return [f"{told} They count in the time of a run, not in that of a step.", ""]


def score_table(results: Tree, benchmark: str) -> list[str]:
    reference = results["reference"]
    lines = [
        f"| method | mean | 95 % | seeds | rate | to {reference} (95 %) | p, clips | p, methods | verdict |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for method in results["methods"]:
        found = method["benchmarks"].get(benchmark)
        rate = "-" if method["chosen"] is None else f"{method['chosen']:g}{ENDS[method['end']]}"
        if found is None:
            lines.append(f"| {method['name']} | - | - | {_seeds(method, None)} | {rate} | - | - | - | {_why(method)} |")
            continue
        gap = found["difference"]
        versus = "-" if gap is None else f"{_signed(gap['mean'])} ({_between(gap['interval'], signed=True)})"
        tests = ("-", "-") if gap is None else (_p(gap["p_clips_holm"]), _p(gap["p_methods_holm"]))
        said = "reference" if method["name"] == reference else verdict(gap)
        lines.append(
            f"| {method['name']} | {percent(found['mean'])} | {_between(found['interval'])} | {_seeds(method, found)} "
            f"| {rate} | {versus} | {tests[0]} | {tests[1]} | {said} |"
        )
    return lines


def verdict(gap: Tree | None) -> str:
    """better or worse where the corrected t test, which knows of clips and seeds, says so; else `not told apart`.

    With one seed, one clip, or no score of the reference there is no such test.
    """
    if gap is None or gap["p_methods_holm"] is None:
        return "not tested"
    if gap["p_methods_holm"] >= 0.05:
        return "not told apart"
    return "better" if (gap["mean"] > 0) != gap.get("lower_is_better", False) else "worse"


def _seeds(method: Tree, found: Tree | None) -> str:
    """How many seeds are in the mean, of how many that were run; the rest diverged or failed."""
    inside, runs = len(found["seeds"]) if found else 0, len(method["runs"])
    return str(inside) if inside == runs else f"{inside} of {runs}"


def _why(method: Tree) -> str:
    if method["chosen"] is None:
        ended = [run["status"] for rate in method["rates"] for run in rate["runs"]]
        if not ended:
            return "not run yet"
        counts = ", ".join(f"{ended.count(status)} {status}" for status in sorted(set(ended)))
        return f"no rate: {counts}" + ("; start again, or take it out" if FAILED in ended else "")
    return "not finished yet"


def _legend(results: Tree) -> list[str]:
    grown = f", after up to {results['config']['extend']} more on that side" if results["config"]["extend"] else ""
    lines = [
        "In per cent, means over seeds. Intervals hold the variation of clips and of seeds (with one seed, of clips only). "
        "Differences are paired by clip. p, clips: sign flips over clips, seeds averaged, for the trained models at hand; "
        "p, methods: a t test that knows of clips and seeds; both two-sided and corrected by Holm over all methods and "
        "benchmarks. The verdict goes by the second, at 5 %; not tested: it needs two seeds of the method and of the "
        "reference."
    ]
    if any(method["end"] for method in results["methods"]):
        lines[0] += (
            f" Rate: ↓ or ↑ the chosen one is the lowest or highest of its grid{grown}, the best may lie beyond; "
            "= the only one tried."
        )
    return lines


def cost_table(results: Tree) -> list[str]:
    reference = next(m for m in results["methods"] if m["name"] == results["reference"])
    base = reference.get("step_seconds")
    lines = [
        "| method | trained parameters | with projectors | step, ms | of reference | peak memory, GB | adapter, kB "
        "| checkpoint, kB | run, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for m in results["methods"]:
        if "trained_parameters" not in m:
            continue
        step, whole = m["step_seconds"], m["seconds"]
        ratio = f"{step / base:.2f}" if step and base else "-"
        lines.append(
            f"| {m['name']} | {m['trained_parameters']:,} | {m['trained_parameters'] + m['projector_parameters']:,} "
            f"| {'-' if step is None else f'{1000 * step:.0f}'} | {ratio} | {m['memory_gb']:.2f} "
            f"| {m['adapter_bytes'] / 1e3:,.0f} | {m['checkpoint_bytes'] / 1e3:,.0f} "
            f"| {'-' if whole is None else f'{whole:.0f}'} |"
        )
    return lines


def rate_table(results: Tree) -> list[str]:
    """Validation loss and share of right answers by rate; the chosen rate in bold. Means over seeds where several."""
    rates = sorted({rate["rate"] for method in results["methods"] for rate in method["rates"] if rate["runs"]})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "--:|" * len(rates)]
    for method in results["methods"]:
        cells = {rate["rate"]: _rate_cell(rate["runs"]) for rate in method["rates"] if rate["runs"]}
        shown = [f"**{cells[r]}**" if r == method["chosen"] else cells.get(r, "") for r in rates]
        lines.append(f"| {method['name']} | {' | '.join(shown)} |")
    return [*lines, "", "Loss (answers wholly right under teacher forcing, %); of the seeds that were run there."]


def _processes(results: Tree) -> str:
    """How the runs shared the machine, which their step times depend on."""
    found = sorted({(m["threads"], m["jobs"]) for m in results["methods"] if "threads" in m})
    return "; ".join(f"{threads} thread{'s' * (threads > 1)} a run, {jobs} at once" for threads, jobs in found)


def _rate_cell(runs: list[Tree]) -> str:
    bad = [run["status"] for run in runs if run["loss"] is None]
    if bad:
        return f"{bad[0]}" + (f" ({len(bad)} of {len(runs)})" if len(runs) > 1 else "")
    return f"{mean_over_seeds(runs, 'loss'):.3f} ({100 * mean_over_seeds(runs, 'accuracy'):.1f})"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _between(interval: list[float] | None, signed: bool = False) -> str:
    if interval is None:
        return "-"
    show = _signed if signed else percent
    return f"{show(interval[0])} to {show(interval[1])}"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.0005 else "< 0.001"
