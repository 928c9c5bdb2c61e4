"""What a benchmark of this folder says beside its figures, where it keeps them, and its tables for people."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mokamm.machine import processors

RESULTS = Path(__file__).resolve().parent / "results"
RATIOS = {
    "moka/lora": "overhead moka/lora",
    "fastest": "fastest overhead moka/lora",
    "moka/plain": "overhead moka/plain",
}


def surroundings(script: str, args: argparse.Namespace, words: Sequence[str] | None = None) -> dict[str, Any]:
    """Command, machine, versions: what a figure is worth nothing without. words: the command's; else this process's."""
    import av
    import peft
    import transformers

    names = processors()
    cpu = f"{names[0]} x {len(names)}" if names else platform.processor()
    machine: dict[str, Any] = {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}
    if getattr(args, "device", "cpu").startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {module.__name__: module.__version__ for module in (torch, peft, transformers, av)}
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "out")}
    command = shlex.join(["python", f"eval/speed/{script}", *(sys.argv[1:] if words is None else words)])
    return {"command": command, "machine": machine, "versions": versions, "seed": 0, "settings": settings}


def keep(found: dict[str, Any], path: Path | None, as_json: bool) -> bool:
    """Write the result where a path is given, and print it where --json asks for it; whether it was printed."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, default=str) + "\n")
    if as_json:
        print(json.dumps(found, default=str))
    return as_json


def print_tables(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    for part in ("layer", "model"):
        if part not in found:
            continue
        names = list(found["settings"]["methods"])
        table = Table("width", "B", *(f"{n} ms" for n in names), *RATIOS, title=f"{part}: step, overhead")
        counts = Table("width", "B", "figure", *names, "moka/lora", title=f"{part}: counted")
        for row in found[part]:
            where = (str(row["width"]), str(row["batch"]))
            if "failed" in row:
                table.add_row(*where, row["failed"])
                continue
            ratios = [row["ratios"].get(ratio) for ratio in RATIOS.values()]
            table.add_row(
                *where,
                *(_ms(row["seconds"].get(n)) for n in names),
                *("-" if r is None else f"{r:.2f}" for r in ratios),
            )
            for what in ("operations", "waits", "saved_bytes", "peak_bytes"):
                values, ratio = row.get(what, {}), row["ratios"].get(f"{what} moka/lora")
                cells = [f"{values[n]:,}" if n in values else "-" for n in names]
                counts.add_row(*where, what, *cells, "" if ratio is None else f"{ratio:.3f}")
        console.print(table, counts)
    if "decode" in found:
        table = Table("method", "tokens/s", "of the base's", title="decode")
        for name, speed in found["decode"]["tokens_per_second"].items():
            ratio = found["decode"]["ratios"].get(f"{name}/base", 1.0)
            table.add_row(name, f"{speed:.1f}", f"{ratio:.3f}")
        console.print(table)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"
