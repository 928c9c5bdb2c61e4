"""The plots of a comparison: accuracy over the rate, and over trained parameters. A method keeps its colour and marker."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mokamm.report import GREY, plain_axes, pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Tree = dict[str, Any]
MARKERS = "osD^vP*Xhd<>p8"
COLUMNS = 4  # panels beside each other


def styles(results: Tree) -> dict[str, tuple[Any, str]]:
    """(colour, marker) of each method; grey is the reference's alone, members of a group share a colour."""
    from matplotlib import colormaps

    keys = list(dict.fromkeys(m["group"] or m["name"] for m in results["methods"] if m["name"] != results["reference"]))
    pairs = [colormaps["tab20"](i) for i in range(20)]  # each colour, then the same in pale
    palette = [colour for colour in (*pairs[::2], *pairs[1::2]) if len(set(colour[:3])) > 1]
    hues = dict(zip(keys, itertools.cycle(palette), strict=False))
    return {
        m["name"]: (hues.get(m["group"] or m["name"], GREY), MARKERS[i % len(MARKERS)])
        for i, m in enumerate(results["methods"])
    }


def plot_rates(results: Tree, path: Path) -> None:
    """Validation accuracy over the rate: a panel for each method, the reference behind it; the chosen rate ringed."""
    plt = pyplot()
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
        plain_axes(axes)
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
    x, y = [rate["rate"] for rate in good], [100 * mean_over_seeds(rate["runs"], "accuracy") for rate in good]
    axes.plot(x, y, "-" if faint else "o-", color=colour, alpha=0.5 if faint else 1.0, linewidth=1.5, markersize=4)
    if faint:
        return
    chosen = [(a, b) for a, b in zip(x, y, strict=True) if a == method["chosen"]]
    axes.plot(*zip(*chosen, strict=True) if chosen else ([], []), "o", markersize=11, fillstyle="none", color=colour)
    for rate in bad:  # at the bottom of the panel, wherever that will be
        axes.plot([rate], [0.04], "x", color="crimson", transform=axes.get_xaxis_transform(), markersize=8)


def plot_parameters(results: Tree, path: Path) -> None:
    """Test score over trained parameters (projectors, which all runs train, left out), a panel for each benchmark.

    Methods of nearly equal counts are drawn beside each other, not upon each other; one that trains projectors alone, which
    has no place on the axis, as a line across.
    """
    plt = pyplot()
    names = list(results["benchmarks"])
    figure, panels = plt.subplots(
        1, len(names), figsize=(5.2 * len(names) + 2.2, 4.8), squeeze=False, layout="constrained"
    )
    looks = styles(results)
    for axes, name in zip(panels.flat, names, strict=True):
        _parameter_panel(axes, results, name, looks)
        axes.set(xscale="log", xlabel="trained parameters without projectors", title=name.replace("_", " "))
        plain_axes(axes)
    panels[0][0].set_ylabel("test score, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _parameter_panel(axes: Axes, results: Tree, name: str, looks: dict[str, tuple[Any, str]]) -> None:
    shown = [m for m in results["methods"] if name in m["benchmarks"]]
    places = side_by_side({m["name"]: m["trained_parameters"] for m in shown if m["trained_parameters"]})
    for group in {m["group"] for m in shown if m["group"]}:
        members = [m for m in shown if m["group"] == group and m["name"] in places]
        members.sort(key=lambda m: m["trained_parameters"])
        means = [100 * m["benchmarks"][name]["mean"] for m in members]
        axes.plot([places[m["name"]] for m in members], means, "-", color=GREY, alpha=0.6, linewidth=1, zorder=1)
    for m in shown:
        found, (colour, marker) = m["benchmarks"][name], looks[m["name"]]
        mean, interval = 100 * found["mean"], found["interval"] or [found["mean"]] * 2
        if m["name"] not in places:
            axes.axhline(mean, color=colour, linestyle="--", linewidth=1, label=m["name"])
            continue
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
        if clusters and counts[name] < apart * counts[clusters[-1][-1]]:
            clusters[-1].append(name)
        else:
            clusters.append([name])
    places = {}
    for cluster in clusters:
        middle = math.exp(sum(math.log(counts[name]) for name in cluster) / len(cluster))
        places.update({name: middle * apart ** (i - (len(cluster) - 1) / 2) for i, name in enumerate(cluster)})
    return places


def mean_over_seeds(runs: list[Tree], key: str) -> float:
    """Of the seeds that have a value; NaN where none has."""
    values = [run[key] for run in runs if run[key] is not None]
    return sum(values) / len(values) if values else math.nan
