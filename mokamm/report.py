"""The report of a run: report/report.md with loss_plot.png, accuracy.png and speed.png, from metrics.jsonl and
predictions/; it links the pages of examples that the evaluation has left in report/examples/.

    python -m mokamm.report RUN        writes it again, also while the run is going on

Nothing is measured here; every number is read from the run folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.schema import UserError
from mokamm.mistakes import tell
from mokamm.training.watch import duration, read_metrics, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, GREEN = "#1f6feb", "#d9730d", "#8b949e", "#2da44e"
Result = dict[str, Any]


def write_report(run: str | Path) -> Path:
    """Write report/ and return the path of report.md. UserError where nothing was trained or evaluated yet.

    A run that came without its metrics.jsonl has the part of the evaluation only.
    """
    run = Path(run)
    records, results = read_metrics(run / "metrics.jsonl"), read_results(run)
    train, validation = _of(records, "train"), _of(records, "validation")
    if not train and not results:
        raise UserError(
            f"{run}/metrics.jsonl holds no training step: give the folder of a run that has logged at least one"
        )
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    if train:
        plot_loss(train, validation, folder / "loss_plot.png")
        plot_speed(train, folder / "speed.png")
    if results or validation:
        plot_accuracy(results, validation, folder / "accuracy.png")
    (folder / "report.md").write_text("\n".join(_page(run, records, results)) + "\n", "utf-8", "backslashreplace")
    return folder / "report.md"


def _of(records: list[dict], kind: str) -> list[dict]:
    return [record for record in records if record["kind"] == kind]


def read_results(run: Path) -> list[Result]:
    """Every predictions/*.metrics.json: benchmarks in order of name, each with its controls after it."""
    found = []
    for path in sorted((run / "predictions").glob("*.metrics.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); delete it, or run eval/run.py again") from None
        plain: Result = {"control": None, "metrics": {}, "interval": None, "unparsed": None, "scale": "share"}
        page = Path("examples") / f"{path.name.removesuffix('.metrics.json')}.html"
        found.append({**plain, "name": result["benchmark"], "examples": page, **result})
    return sorted(found, key=lambda r: (r["name"], r["control"] or ""))


def results_table(results: list[Result]) -> list[str]:
    """Markdown: score, interval, unreadable answers, and every plain number that the benchmark measured."""
    lines = ["| benchmark | control | rows | score | 95 % interval | unread | more |", "|---|---|--:|--:|--:|--:|---|"]
    for r in results:
        times, unit = (100, " %") if r["scale"] == "share" else (1, "")
        score = "-" if r["score"] is None else f"{times * r['score']:.1f}{unit}"
        interval = " - ".join(f"{times * end:.1f}" for end in r["interval"] or ())
        more = ", ".join(f"{_name(name)} {_number(value)}" for name, value in _numbers(r["metrics"]))
        unread = "" if r["unparsed"] is None else r["unparsed"]
        lines.append(f"| {r['name']} | {r['control'] or ''} | {r['rows']} | {score} | {interval} | {unread} | {more} |")
    return lines


def breakdown_tables(result: Result) -> list[str]:
    """Markdown: what a benchmark measured by group, as {table: {group: {measure: number}}}."""
    lines: list[str] = []
    for table, groups in result["metrics"].items():
        grouped = groups.items() if isinstance(groups, dict) else ()
        rows = {group: _numbers(found) for group, found in grouped if _numbers(found)}
        if rows:
            measures = list(dict.fromkeys(name for found in rows.values() for name, _ in found))
            lines += ["", f"### {result['name']}: {_name(table)}", ""]
            lines += [f"| | {' | '.join(_name(m) for m in measures)} |", "|---|" + "--:|" * len(measures)]
            for group, found in rows.items():
                cells = dict(found)
                shown = (_number(cells[m]) if m in cells else "" for m in measures)
                lines.append(f"| {group} | {' | '.join(shown)} |")
    return lines


def _numbers(values: Any) -> list[tuple[str, float]]:
    """The plain numbers of a mapping, and those of its `baselines`, which belong beside the score."""
    found: list[tuple[str, float]] = []
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append((name, value))
        elif name == "baselines":
            found += [(f"baseline {key}", number) for key, number in _numbers(value)]
    return found


def _name(key: str) -> str:
    return key.replace("_", " ")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.4g}"


def _page(run: Path, records: list[dict], results: list[Result]) -> list[str]:
    train, validation = (_of(records, kind) for kind in ("train", "validation"))
    lines = [f"# {run.name}", "", *(_training(records) if train else [])]
    if validation:
        lines += ["| step | validation loss | answers exactly right |", "|--:|--:|--:|"]
        lines += [f"| {r['step']} | {r['loss']:.4f} | {100 * r['accuracy']:.1f} % |" for r in validation]
        lines += ["", "Right under teacher forcing: every token of the answer is the most probable one.", ""]
    if results:
        lines += ["## Evaluation", "", *results_table(results), ""]
        lines += ["Scores are over all rows; an answer that cannot be read (unread) is wrong."]
        pages = [r for r in results if (run / "report" / r["examples"]).is_file()]
        if pages:
            links = (f"[{r['examples'].stem}]({r['examples'].as_posix()})" for r in pages)
            lines += ["", f"Right and wrong examples, with their media: {', '.join(links)}"]
        lines += [line for r in results if not r["control"] for line in breakdown_tables(r)] + [""]
    if results or validation:
        lines += ["![accuracy](accuracy.png)", ""]
    return [*lines, *(["## Speed and memory", "", "![speed](speed.png)"] if train else [])]


def _training(records: list[dict]) -> list[str]:
    train, first = (_of(records, kind) for kind in ("train", "calibration"))
    last, bad_steps = train[-1], len(_of(records, "bad_step"))
    seconds = max(sum(r["seconds"] for r in train), 1e-9)
    waited = sum(r["data_wait_share"] * r["seconds"] for r in train)
    tokens = [r["tokens_per_second"] * r["seconds"] for r in train]
    places = sum(number / (1 - r["padding_share"]) for number, r in zip(tokens, train, strict=True))
    return [
        "![loss](loss_plot.png)",
        "",
        "| training | |",
        "|---|---|",
        f"| steps | {last['step']} ({last['epoch']:.2f} epochs) |",
        f"| loss, last logged | {last['loss']:.4f} |",
        f"| time in steps | {duration(seconds)} |",
        *(
            f"| before it, {r['run']}, from which the mask was cut | {r['steps']} steps, {duration(r['seconds'])} |"
            for r in first
        ),
        f"| speed | {short(sum(tokens) / seconds)} tokens/s, {100 * waited / seconds:.1f} % waiting for data |",
        f"| padding | {100 * (1 - sum(tokens) / max(places, 1e-9)):.1f} % of all places |",
        f"| peak memory | {max(r['memory_gb'] for r in train):.2f} GB |",
        *([f"| steps without an update | {bad_steps}; their rows: `bad_step` in metrics.jsonl |"] if bad_steps else []),
        "",
    ]


# ---- plots -----------------------------------------------------------------------------------------------------------


def plot_loss(train: list[dict], validation: list[dict], path: Path) -> None:
    """Training loss (thin), its running mean, validation loss; the rates below."""
    plt = pyplot()
    figure, (loss, rate) = plt.subplots(2, 1, figsize=(8, 6), height_ratios=[3, 1], sharex=True, layout="constrained")
    steps = [r["step"] for r in train]
    _curve(loss, steps, [r["loss"] for r in train], BLUE, "training (running mean)")
    if validation:
        loss.plot(
            [r["step"] for r in validation], [r["loss"] for r in validation], "o-", color=ORANGE, label="validation"
        )
    loss.set_ylabel("loss per answer token")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)
    for part, colour in zip(train[-1]["learning_rate"], (BLUE, GREEN, ORANGE), strict=False):
        rate.plot(steps, [r["learning_rate"].get(part, 0.0) for r in train], color=colour, label=part)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.legend(frameon=False)
    for axes in (loss, rate):
        plain_axes(axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_speed(train: list[dict], path: Path) -> None:
    """Tokens per second, shares of padding and of waiting for data, peak memory, gradient norm, over the steps."""
    plt = pyplot()
    figure, panels = plt.subplots(4, 1, figsize=(8, 8), sharex=True, layout="constrained")
    speed, shares, memory, norm = panels
    steps = [r["step"] for r in train]
    _curve(speed, steps, [r["tokens_per_second"] for r in train], BLUE)
    _curve(shares, steps, [100 * r["padding_share"] for r in train], GREY, "padding, of all places")
    _curve(shares, steps, [100 * r["data_wait_share"] for r in train], ORANGE, "waiting for data, of the time")
    shares.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.95))
    memory.plot(steps, [r["memory_gb"] for r in train], color=GREEN, linewidth=2)
    _curve(norm, steps, [r["grad_norm"] for r in train], BLUE)
    for axes, label in zip(panels, ("tokens/s", "share, %", "peak memory, GB", "gradient norm"), strict=True):
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        plain_axes(axes)
    norm.set_xlabel("step")
    figure.align_ylabels()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(axes: Axes, steps: list[int], values: list[float], colour: str, label: str | None = None) -> None:
    """The values (thin) and their running mean."""
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, running_mean(values), color=colour, linewidth=2, label=label)


def plot_accuracy(results: list[Result], validation: list[dict], path: Path) -> None:
    """Scores (shares only) of the benchmarks with their controls; without any, the validation's share of right answers."""
    plt = pyplot()
    results = [r for r in results if r["scale"] == "share"]
    if not results:
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        axes.plot([r["step"] for r in validation], [100 * r["accuracy"] for r in validation], "o-", color=BLUE)
        axes.set(xlabel="step", ylabel="validation answers exactly right, %", ylim=(0, 100))
        plain_axes(axes)
    else:
        bars = results[::-1]
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.42 * len(bars)), layout="constrained")
        scores = [100 * (r["score"] or 0.0) for r in bars]
        names = [r["name"].replace("_", " ") + (f" · {r['control']}" if r["control"] else "") for r in bars]
        drawn = axes.barh(names, scores, color=[GREY if r["control"] else BLUE for r in bars], height=0.65)
        axes.bar_label(drawn, [f"{score:.1f}" for score in scores], padding=4)
        for y, r in enumerate(bars):
            if r["interval"]:  # drawn inside the bar's row, below its label
                axes.plot([100 * end for end in r["interval"]], [y - 0.24] * 2, color="black", linewidth=1.4)
        axes.set(xlabel="score, %", xlim=(min(0.0, *scores), 105))
        plain_axes(axes, grid="x")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def running_mean(values: list[float]) -> list[float]:
    """Mean of each value and up to the `window - 1` before it; the window is a twentieth of the whole."""
    window = max(1, len(values) // 20)
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def plain_axes(axes: Axes, grid: str = "both") -> None:
    """Without a frame at the top and right, over a pale grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, alpha=0.25)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def pyplot() -> Any:
    """matplotlib.pyplot, which needs no display here, in the reports' type size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.titlesize": 12})
    return plt


def main() -> None:
    from mokamm.training.disk import writing

    parser = argparse.ArgumentParser(
        prog="python -m mokamm.report", description="Write report/ of a run again, also while it is going on."
    )
    parser.add_argument("run", nargs="?", type=Path, default=Path("."), metavar="RUN", help="its folder (this one)")
    of = parser.parse_args().run
    try:
        with writing(of / "report", "make room or allow it, then start the same command again"):
            print(write_report(of))
    except UserError as problem:
        sys.exit(tell(problem))


if __name__ == "__main__":
    main()
