"""Metrics as tables for people; programs get the same as one JSON object. Shares are shown in per cent, points as such."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

COUNTS = ("rows", "unparsed", "bad")
FILE_COUNTS = ("rows", "parsed", "unparsed", "bad", "duplicates", "missing", "extra")
WIDTH = 110  # where standard output is no terminal


def print_metrics(results: Mapping[str, dict[str, Any]], title: str) -> None:
    """One table over all benchmarks, then the details of each."""
    from rich.table import Column, Table

    console = _console()
    scores = ("score", "95 % interval", "official")
    table = Table(Column("benchmark", no_wrap=True), *scores, *COUNTS, "measure", title=title)
    for name, metrics in results.items():
        scale = metrics["scale"]
        shown = (cell(metrics["score"], scale), between(metrics["interval"], scale))
        official = cell(metrics["rules"]["official"]["score"], scale)
        counts = (str(metrics[key]) for key in COUNTS)
        table.add_row(name, *shown, official, *counts, _measure(metrics))
    console.print(table)
    for name, metrics in results.items():
        for detail in detail_tables(name, metrics["metrics"], metrics["scale"]):
            console.print(detail)


def print_rules(result: Mapping[str, Any]) -> None:
    """A scored predictions file: both rules side by side, then each rule's tables and the paired test."""
    from rich.table import Table

    console, scale, rules = _console(), result["scale"], result["rules"]
    counts = ", ".join(f"{result[key]} {key}" for key in FILE_COUNTS if result[key] or key in COUNTS)
    table = Table(_measure(result), *rules, title=f"{result['benchmark']}: {counts}")
    table.add_row("score", *(cell(rule["score"], scale) for rule in rules.values()))
    table.add_row("95 % interval", *(between(rule["interval"], scale) for rule in rules.values()))
    for key in ("rows", "parsed", "unparsed"):
        table.add_row(key, *(str(rule[key]) for rule in rules.values()))
    console.print(table)
    for name, rule in rules.items():
        details = {key: value for key, value in rule.items() if key not in ("score", "interval")}
        for detail in detail_tables(name, details, scale):
            console.print(detail)
    if "against" in result:
        test = result["against"]
        change = f"{cell(test['difference'], scale)} ({between(test['interval'], scale)})"
        console.print(
            f"against {test['predictions']}: {cell(test['score'], scale)} there, difference {change}, "
            f"p = {test['p_value']:.4g} over {test['units']} units"
        )


def _measure(result: Mapping[str, Any]) -> str:
    return result["measure"] + (" (%)" if result["scale"] == "share" else "")


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def detail_tables(name: str, figures: Mapping[str, Any], scale: str = "share") -> list[Any]:
    """Single floats together in one table; every mapping of mappings as a table of its own."""
    from rich.table import Table

    single = {key: value for key, value in figures.items() if isinstance(value, float)}
    single |= {f"baseline: {key}": value for key, value in figures.get("baselines", {}).items()}
    tables = []
    if single:
        table = Table("figure", "%" if scale == "share" else "points", title=name)
        for key, value in single.items():
            table.add_row(key.replace("_", " "), cell(value, scale))
        tables.append(table)
    for key, value in figures.items():
        if isinstance(value, dict) and value and all(isinstance(line, dict) for line in value.values()):
            columns = list(next(iter(value.values())))
            table = Table(key, *columns, title=f"{name}: {key}")
            for line, cells in value.items():
                table.add_row(_plain(line), *(cell(cells[column], scale) for column in columns))
            tables.append(table)
    return tables


def _plain(text: str) -> Any:
    """A name out of an annotation file, which may hold rich's markup or half a letter."""
    from rich.text import Text

    return Text(text.encode(errors="backslashreplace").decode())


def between(interval: Sequence[float] | None, scale: str = "share") -> str:
    return f"{cell(interval[0], scale)} - {cell(interval[1], scale)}" if interval else "-"


def cell(value: Any, scale: str = "share") -> str:
    """Shares in per cent, points as they are."""
    if not isinstance(value, float):
        return str(value)
    return f"{100 * value:.1f}" if scale == "share" else f"{value:.3f}".rstrip("0").rstrip(".")
