"""What a benchmark of this folder says beside its figures, and its tables for people."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch

RATIOS = {
    "moka/lora": "overhead moka/lora",
    "fastest": "fastest overhead moka/lora",
    "moka/plain": "overhead moka/plain",
}


def surroundings(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, command: what a figure is worth nothing without."""
    import peft
    import transformers

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{models[0]} x {len(models)}" if models else cpu
    machine: dict[str, Any] = {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}
    if args.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "out")}
    return {"machine": machine, "versions": versions, "seed": 0, "settings": settings}


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
