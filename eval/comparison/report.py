"""The report of a comparison: report.md with its plots, and results.json, from the tree that results.gather made.

Nothing is measured here. A method's figures in the plots keep one colour and one marker throughout.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mokamm.report import GREY, _plain, _pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tree = dict[str, Any]
ENDS = {"": "", "lowest": " ↓", "highest": " ↑", "only": " ="}
MARKERS = "osD^vP*Xhd<>p8"
COLUMNS = 4  # panels beside each other


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
    ]
    for name, measure in results["benchmarks"].items():
        lines += [f"## {name}: {measure}, test split", "", *score_table(results, name), ""]
    lines += [*_legend(results), "", "![rates](rates.png)", "", "![parameters](parameters.png)", ""]
    lines += ["## Costs", "", *cost_table(results), ""]
    lines += [
        "Step time: median over the stretches between two log lines, the first left out, then over seeds. Memory: "
    ]
    lines[-1] += "greatest peak of a run's process, Python and libraries included. Sizes: the adapter (or the LLM) of "
    lines[-1] += "`final/`, and a whole checkpoint with projectors and optimizer."
    lines += ["", "## Validation at every rate", "", *rate_table(results), ""]
    lines += [f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items())}. {_processes(results)}"]
    return lines


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
        lines.append(
            f"| {method['name']} | {percent(found['mean'])} | {_between(found['interval'])} | {_seeds(method, found)} "
            f"| {rate} | {versus} | {tests[0]} | {tests[1]} | {verdict(gap)} |"
        )
    return lines


def verdict(gap: Tree | None) -> str:
    """better or worse where the corrected t test, which knows of clips and seeds, says so; else `not told apart`.

    With one seed, or one clip, there is no such test.
    """
    if gap is None:
        return "reference"
    p = gap["p_methods_holm"]
    if p is None:
        return "not tested"
    if p >= 0.05:
        return "not told apart"
    return "better" if gap["mean"] > 0 else "worse"


def _seeds(method: Tree, found: Tree | None) -> str:
    """How many seeds are in the mean, of how many that were run; the rest diverged or failed."""
    inside, runs = len(found["seeds"]) if found else 0, len(method["runs"])
    return str(inside) if inside == runs else f"{inside} of {runs}"


def _why(method: Tree) -> str:
    if method["chosen"] is None:
        ended = [run["status"] for rate in method["rates"] for run in rate["runs"]]
        return f"no rate: {', '.join(f'{ended.count(s)} {s}' for s in sorted(set(ended)))}" if ended else "not run yet"
    return "not finished yet"


def _legend(results: Tree) -> list[str]:
    grown = f", after up to {results['config']['extend']} more on that side" if results["config"]["extend"] else ""
    lines = [
        "In per cent, means over seeds. Intervals hold the variation of clips and of seeds (with one seed, of clips only). "
        "Differences are paired by clip. p, clips: sign flips over clips, seeds averaged, for the trained models at hand; "
        "p, methods: a t test that knows of clips and seeds; both two-sided and corrected by Holm over all methods and "
        "benchmarks. The verdict goes by the second, at 5 %; not tested: it needs two seeds."
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
        step = m["step_seconds"]
        ratio = f"{step / base:.2f}" if step and base else "-"
        lines.append(
            f"| {m['name']} | {m['trained_parameters']:,} | {m['trained_parameters'] + m['projector_parameters']:,} "
            f"| {'-' if step is None else f'{1000 * step:.0f}'} | {ratio} | {m['memory_gb']:.2f} "
            f"| {m['adapter_bytes'] / 1e3:,.0f} | {m['checkpoint_bytes'] / 1e3:,.0f} | {m['seconds']:.0f} |"
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
    return f"{_mean(runs, 'loss'):.3f} ({100 * _mean(runs, 'accuracy'):.1f})"


def _mean(runs: list[Tree], key: str) -> float:
    values = [run[key] for run in runs if run[key] is not None]
    return sum(values) / len(values) if values else math.nan


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


# ---- plots -----------------------------------------------------------------------------------------------------------


def styles(results: Tree) -> dict[str, tuple[Any, str]]:
    """(colour, marker) of each method; the reference is grey, members of a group share a colour."""
    from matplotlib import colormaps

    keys = list(dict.fromkeys(m["group"] or m["name"] for m in results["methods"] if m["name"] != results["reference"]))
    hues = {key: colormaps["tab20"]((2 * i) % 20 + (i >= 10)) for i, key in enumerate(keys)}
    return {
        m["name"]: (hues.get(m["group"] or m["name"], GREY), MARKERS[i % len(MARKERS)])
        for i, m in enumerate(results["methods"])
    }


def plot_rates(results: Tree, path: Path) -> None:
    """Validation accuracy over the rate: a panel for each method, the reference behind it; the chosen rate ringed."""
    plt = _pyplot()
    methods = [m for m in results["methods"] if any(rate["runs"] for rate in m["rates"])] or results["methods"]
    columns = min(COLUMNS, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(3.1 * columns + 0.6, 2.7 * rows + 0.4), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    looks = styles(results)
    reference = next(m for m in results["methods"] if m["name"] == results["reference"])
    for axes, method in zip(panels.flat, methods, strict=False):
        if method is not reference:
            _rate_curve(axes, reference, GREY, faint=True)
        _rate_curve(axes, method, looks[method["name"]][0] if method is not reference else "black")
        axes.set_title(method["name"], fontsize=11)
        axes.set_xscale("log")
        _plain(axes)
    for hidden, above in zip(panels.flat[len(methods) :], panels.flat[len(methods) - columns :], strict=False):
        hidden.set_visible(False)
        above.tick_params(labelbottom=True)
    figure.supxlabel("learning rate")
    figure.supylabel("validation answers right, %")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _rate_curve(axes: Axes, method: Tree, colour: Any, faint: bool = False) -> None:
    good = [rate for rate in method["rates"] if rate["runs"] and all(r["accuracy"] is not None for r in rate["runs"])]
    bad = [rate["rate"] for rate in method["rates"] if rate["runs"] and rate not in good]
    x, y = [rate["rate"] for rate in good], [100 * _mean(rate["runs"], "accuracy") for rate in good]
    axes.plot(x, y, "-" if faint else "o-", color=colour, alpha=0.5 if faint else 1.0, linewidth=1.5, markersize=4)
    if faint:
        return
    chosen = [(a, b) for a, b in zip(x, y, strict=True) if a == method["chosen"]]
    axes.plot(*zip(*chosen, strict=True) if chosen else ([], []), "o", markersize=11, fillstyle="none", color=colour)
    for rate in bad:  # at the bottom of the panel, wherever that will be
        axes.plot([rate], [0.04], "x", color="crimson", transform=axes.get_xaxis_transform(), markersize=8)


def plot_parameters(results: Tree, path: Path) -> None:
    """Test score over trained parameters (projectors, which all runs train, left out), a panel for each benchmark.

    Methods of nearly equal counts are drawn beside each other, not upon each other.
    """
    plt = _pyplot()
    names = list(results["benchmarks"])
    figure, panels = plt.subplots(
        1, len(names), figsize=(5.2 * len(names) + 2.2, 4.8), squeeze=False, layout="constrained"
    )
    looks = styles(results)
    for axes, name in zip(panels.flat, names, strict=True):
        _parameter_panel(axes, results, name, looks)
        axes.set(xscale="log", xlabel="trained parameters without projectors", title=name.replace("_", " "))
        _plain(axes)
    panels[0][0].set_ylabel("test score, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _parameter_panel(axes: Axes, results: Tree, name: str, looks: dict[str, tuple[Any, str]]) -> None:
    shown = [m for m in results["methods"] if name in m["benchmarks"]]
    places = side_by_side({m["name"]: m["trained_parameters"] for m in shown})
    for group in {m["group"] for m in shown if m["group"]}:
        members = sorted((m for m in shown if m["group"] == group), key=lambda m: m["trained_parameters"])
        means = [100 * m["benchmarks"][name]["mean"] for m in members]
        axes.plot([places[m["name"]] for m in members], means, "-", color=GREY, alpha=0.6, linewidth=1, zorder=1)
    for m in shown:
        found, (colour, marker) = m["benchmarks"][name], looks[m["name"]]
        mean, interval = 100 * found["mean"], found["interval"] or [found["mean"]] * 2
        error = [[max(0.0, mean - 100 * interval[0])], [max(0.0, 100 * interval[1] - mean)]]
        axes.errorbar(
            [places[m["name"]]], [mean], yerr=error, color=colour, marker=marker, markersize=8, capsize=2,
            elinewidth=1, linestyle="none", label=m["name"],
        )  # fmt: skip


def side_by_side(counts: dict[str, int], apart: float = 1.09) -> dict[str, float]:
    """Where to draw each count on a logarithmic axis: those that would lie on each other stand around their mean."""
    order = sorted(counts, key=lambda name: counts[name])
    clusters: list[list[str]] = []
    for name in order:
        near = clusters and counts[name] < apart * counts[clusters[-1][-1]]
        clusters[-1].append(name) if near else clusters.append([name])
    places = {}
    for cluster in clusters:
        middle = math.exp(sum(math.log(counts[name]) for name in cluster) / len(cluster))
        places.update({name: middle * apart ** (i - (len(cluster) - 1) / 2) for i, name in enumerate(cluster)})
    return places
