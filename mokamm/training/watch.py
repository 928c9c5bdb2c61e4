"""What one can watch of a run: metrics.jsonl, TensorBoard, and a line or bar of progress. All of it on rank 0 only.

metrics.jsonl, one object a line:
    {"kind": "train", "step", "epoch", "loss", "learning_rate": {part: rate}, "grad_norm", "tokens_per_second",
     "padding_share", "data_wait_share", "memory_gb", "seconds"}
    {"kind": "validation", "step", "epoch", "loss", "accuracy", "samples", "missing"}
    {"kind": "bad_step", "step", "epoch", "reason", "micro_batches": [{"loss", "rows": [{"source", "row", "id"}]}]}

Each step stands there once, in order: a resumed run drops what lies beyond its checkpoint before it writes. While a run
is interrupted, the last line may be cut; `read_metrics` leaves it out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mokamm.training.disk import writing

METRICS = "metrics.jsonl"
ADVICE = "make room or mend the disk, then start the same command again: it goes on from its newest checkpoint"
SHOWN = 32  # rows that a message names; their record names all


class Watch:
    """Writes and shows records; `first_step` > 0 drops what an interrupted run had logged beyond its checkpoint."""

    def __init__(self, run: Path, total_steps: int, first_step: int, report_to: list[str]) -> None:
        self.total, self.first, self.began = total_steps, first_step, time.monotonic()
        self.path = run / METRICS
        with writing(self.path, ADVICE):
            forget_after(self.path, first_step)
            self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open for the whole run
        self.board = _tensorboard(run / "tensorboard", first_step) if "tensorboard" in report_to else None
        self.shown = _Bar(total_steps, first_step) if sys.stdout.isatty() else _Lines()

    def record(self, kind: str, values: dict[str, Any]) -> None:
        record = {"kind": kind, **values}
        with writing(self.path, ADVICE):
            self.file.write(json.dumps(record) + "\n")
            if self.board:  # it writes in a thread, and raises here what failed there
                for name, value in _flat(values):
                    if name != "step" and isinstance(value, int | float):
                        self.board.add_scalar(f"{kind}/{name}", value, values["step"])
        self.shown.record(kind, values, self.total, self.left(values["step"]))

    def advance(self, step: int) -> None:
        self.shown.advance(step)

    def left(self, step: int) -> float:
        """Seconds until the last step at the pace so far."""
        return (time.monotonic() - self.began) / max(1, step - self.first) * (self.total - step)

    def sync(self) -> None:
        """Flush the records to disk, before a checkpoint that relies on them."""
        with writing(self.path, ADVICE):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.shown.close()
        with suppress(OSError):  # only what `record` has told already is left to be written
            self.file.close()
        with suppress(OSError):
            if self.board:
                self.board.close()


class _Lines:
    """For logs: one line a record."""

    def record(self, kind: str, values: dict[str, Any], total: int, left: float) -> None:
        print(describe(kind, values, total, left), flush=True)

    def advance(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class _Bar:
    """For terminals: a bar below the lines of validations."""

    def __init__(self, total: int, first: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("training", total=total, completed=first, note="")
        self.progress.start()

    def record(self, kind: str, values: dict[str, Any], total: int, left: float) -> None:
        if kind == "train":
            note = f"loss {values['loss']:.4f}  {short(values['tokens_per_second'])} tokens/s"
            self.progress.update(self.task, completed=values["step"], note=note)
        else:
            self.progress.console.print(describe(kind, values, total, left))

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def close(self) -> None:
        self.progress.stop()


def describe(kind: str, values: dict[str, Any], total: int, left: float) -> str:
    """A record as a line for people."""
    head = f"step {values['step']:>{len(str(total))}}/{total}  epoch {values['epoch']:.2f}"
    if kind == "validation":
        right = f"answers right {values['accuracy']:.1%} of {values['samples']:.0f}"
        right += f" ({values['missing']:.0f} unusable)" if values.get("missing") else ""
        return f"{head}  validation loss {values['loss']:.4f}  {right}"
    if kind == "bad_step":
        rows = "; ".join(named(values["micro_batches"]))
        return f"{head}  warning: {values['reason']}; no update was made. Rows: {rows}"
    rates = "  ".join(f"{part} lr {rate:.1e}" for part, rate in values["learning_rate"].items())
    speed = f"{short(values['tokens_per_second'])} tokens/s  left {duration(left)}"
    return f"{head}  loss {values['loss']:.4f}  norm {values['grad_norm']:.2f}  {rates}  {speed}"


def named(micro_batches: list[dict[str, Any]]) -> list[str]:
    """A line for each micro batch, until SHOWN rows are named."""
    lines, shown, all_rows = [], 0, sum(len(entry["rows"]) for entry in micro_batches)
    for entry in micro_batches:
        if shown >= SHOWN:
            lines.append(f"and {all_rows - shown} more rows")
            break
        loss = entry["loss"] if isinstance(entry["loss"], str) else f"{entry['loss']:.4g}"
        rows = ", ".join(f"{row['source']} row {row['row']} (id {row['id']})" for row in entry["rows"])
        lines.append(f"loss {loss}: {rows}")
        shown += len(entry["rows"])
    return lines


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(number: float) -> str:
    """1234567 -> 1.2M"""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.0f}{unit}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}T"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line cut by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def forget_after(path: Path, step: int) -> None:
    """Drop the records of steps that will be run again."""
    if path.is_file():
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w") as file:
            file.write("".join(kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def memory_gb() -> float:
    """Peak memory so far: of the GPU where there is one in use, else of this process."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _tensorboard(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)


def _flat(values: dict[str, Any]) -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        flat += (
            [(f"{name}/{key}", entry) for key, entry in value.items()] if isinstance(value, dict) else [(name, value)]
        )
    return flat
