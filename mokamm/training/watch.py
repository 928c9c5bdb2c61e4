"""What one can watch of a run: metrics.jsonl, TensorBoard, W&B, and a line or bar of progress. On rank 0 only.

metrics.jsonl, one object a line:
    {"kind": "train", "step", "epoch", "loss", "learning_rate": {part: rate}, "grad_norm", "tokens_per_second",
     "padding_share", "data_wait_share", "memory_gb", "seconds"}
    {"kind": "validation", "step", "epoch", "loss", "accuracy", "samples", "missing"}
    {"kind": "bad_step", "step", "epoch", "reason", "micro_batches": [{"loss", "rows": [{"source", "row", "id"}]}]}
    {"kind": "calibration", "step": 0, "epoch", "steps", "seconds", "loss", "run"}    the first line, of two_phase.py

Each step stands there once, in order: a resumed run drops what lies beyond its checkpoint before it writes. While a run
is interrupted, the last line may be cut; `read_metrics` leaves it out. JSON has no NaN and no infinity: a validation loss
that is no number stands there as null, and `read_metrics` gives NaN.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from data.schema import UserError
from mokamm.machine import installed
from mokamm.training.disk import replacing, writing

METRICS = "metrics.jsonl"
ADVICE = "make room or mend the disk, then start the same command again: it goes on from its newest checkpoint"
SHOWN = 32  # rows that a message names; their record names all


class Writer(Protocol):
    """One place where records go. values: {"step", "epoch", ...}; close() ends it, also after an error."""

    def record(self, kind: str, values: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Watch:
    """Writes and shows records; `first_step` > 0 drops what an interrupted run had logged beyond its checkpoint."""

    def __init__(self, run: Path, total_steps: int, first_step: int, report_to: Sequence[str]) -> None:
        self.total, self.first, self.began = total_steps, first_step, time.monotonic()
        self.path = run / METRICS
        with writing(self.path, ADVICE):
            self.lines = JsonLines(run, first_step)
        self.writers: list[Writer] = [self.lines, *(WRITERS[name](run, first_step) for name in report_to)]
        self.shown = _Bar(total_steps, first_step) if sys.stdout.isatty() else _Lines()

    def record(self, kind: str, values: dict[str, Any]) -> None:
        with writing(self.path, ADVICE):  # TensorBoard writes in a thread, and raises here what failed there
            for writer in self.writers:
                writer.record(kind, values)
        self.shown.record(kind, values, self.total, self.left(values["step"]))

    def advance(self, step: int) -> None:
        self.shown.advance(step)

    def left(self, step: int) -> float:
        """Seconds until the last step at the pace so far."""
        return (time.monotonic() - self.began) / max(1, step - self.first) * (self.total - step)

    def sync(self) -> None:
        """Flush the records to disk, before a checkpoint that relies on them."""
        with writing(self.path, ADVICE):
            self.lines.sync()

    def close(self) -> None:
        self.shown.close()
        for writer in self.writers:
            with suppress(OSError):  # only what `record` has told already is left to be written
                writer.close()


# ---- writers ---------------------------------------------------------------------------------------------------------


class JsonLines:
    """RUN/metrics.jsonl: what the report and other programs read."""

    def __init__(self, run: Path, first_step: int) -> None:
        forget_after(run / METRICS, first_step)
        self.file = open(run / METRICS, "a", buffering=1)  # noqa: SIM115 - open for the whole run

    def record(self, kind: str, values: dict[str, Any]) -> None:
        self.file.write(_line({"kind": kind, **values}))

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """RUN/tensorboard."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        for name, value in _flat(kind, values).items():
            self.board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self.board.close()


class WeightsAndBiases:
    """W&B, a run named after the folder, with its config; files in RUN/wandb.

    W&B's own variables rule: WANDB_MODE=offline needs no network (`wandb sync` sends it later), WANDB_PROJECT,
    WANDB_ENTITY, WANDB_RUN_ID with WANDB_RESUME to go on with an earlier one.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        import wandb
        import yaml

        config = run / "config.yaml"
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mokamm"),
                name=os.environ.get("WANDB_NAME", run.resolve().name),
                dir=str(run),
                config=yaml.safe_load(config.read_text()) if config.is_file() else None,
                settings=wandb.Settings(console="off"),  # the progress bar keeps the terminal
            )
        except wandb.Error as error:
            raise UserError(
                f"W&B cannot start: {error}. Run `wandb login`, or set WANDB_MODE=offline, or leave wandb out of "
                "training.report_to"
            ) from error

    def record(self, kind: str, values: dict[str, Any]) -> None:
        self.run.log(_flat(kind, values), step=values["step"])

    def close(self) -> None:
        self.run.finish()


WRITERS: dict[str, Callable[[Path, int], Writer]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_report_to(names: Sequence[str]) -> None:
    """Raise UserError, before anything is built, for a writer whose package is not installed."""
    if "wandb" in names and not installed(["wandb"]):  # a folder of that name, which W&B leaves, could be imported too
        raise UserError(
            "training.report_to names wandb, which is not installed: uv sync --extra wandb (or pip install wandb), or "
            "training.report_to=[tensorboard]; metrics.jsonl is always written"
        )


def _flat(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """{"train/loss": ..., "train/learning_rate/adapter": ...}, without the step."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        numbers = [(key, entry) for key, entry in nested if name != "step" and isinstance(entry, int | float)]
        flat.update({f"{kind}/{name}{'/' if key else ''}{key}": entry for key, entry in numbers})
    return flat


# ---- for people ------------------------------------------------------------------------------------------------------


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
        with suppress(ValueError):
            record = json.loads(line)
            records.append({name: math.nan if value is None else value for name, value in record.items()})
    return records


def _line(record: dict[str, Any]) -> str:
    """As it stands in metrics.jsonl."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def forget_after(path: Path, step: int) -> None:
    """Drop the records of steps that will be run again."""
    if path.is_file():
        kept = [_line(record) for record in read_metrics(path) if record["step"] <= step]
        with replacing(path) as beside:
            beside.write_text("".join(kept))


def memory_gb() -> float:
    """Peak memory so far: of the GPU where there is one in use, else of this process."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
