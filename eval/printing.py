"""Metrics as tables for people; programs get the same as one JSON object. Floats are shares, shown in per cent."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

COUNTS = ("rows", "unparsed", "bad")
WIDTH = 110  # where standard output is no terminal


@contextmanager
def stdout_kept_clean(keep: bool) -> Iterator[None]:
    """While it holds, what anything (a library, a subprocess) writes to standard output goes to standard error."""
    if not keep:
        yield
        return
    sys.stdout.flush()
    python_stdout, saved = sys.stdout, os.dup(1)
    try:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = python_stdout
        os.dup2(saved, 1)
        os.close(saved)


def print_metrics(results: Mapping[str, dict[str, Any]], title: str) -> None:
    """One table over all benchmarks, then the details of each."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    table = Table(Column("benchmark", no_wrap=True), "score %", "95 % interval", *COUNTS, "measure", title=title)
    for name, metrics in results.items():
        interval = metrics["interval"]
        between = f"{cell(interval[0])} - {cell(interval[1])}" if interval else "-"
        counts = (str(metrics[key]) for key in COUNTS)
        table.add_row(name, cell(metrics["score"]), between, *counts, metrics["measure"])
    console.print(table)
    for name, metrics in results.items():
        for detail in detail_tables(name, metrics["metrics"]):
            console.print(detail)


def detail_tables(name: str, figures: Mapping[str, Any]) -> list[Any]:
    """Single floats together in one table; every mapping of mappings as a table of its own."""
    from rich.table import Table

    single = {key: value for key, value in figures.items() if isinstance(value, float)}
    single |= {f"baseline: {key}": value for key, value in figures.get("baselines", {}).items()}
    tables = []
    if single:
        table = Table("figure", "%", title=name)
        for key, value in single.items():
            table.add_row(key.replace("_", " "), cell(value))
        tables.append(table)
    for key, value in figures.items():
        if isinstance(value, dict) and value and all(isinstance(line, dict) for line in value.values()):
            columns = list(next(iter(value.values())))
            table = Table(key, *columns, title=f"{name}: {key}")
            for line, cells in value.items():
                table.add_row(line, *(cell(cells[column]) for column in columns))
            tables.append(table)
    return tables


def cell(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)
