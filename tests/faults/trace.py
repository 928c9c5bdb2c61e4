"""Where a training stands, in a small file that is mapped into memory and so outlives a killed process.

trace = Trace(path)      phase, step of the last finished save; for each phase how often entered, how long inside
follow(trace, toy)       wraps the functions of the real loop, in this process only
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PHASES = ("start", "resume", "step", "log", "validation", "save", "manifest", "rename", "rotation", "final", "between")


class Trace:
    """Layout: [phase, saved step, entries of each phase ..., seconds in each phase ...]"""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * (2 + 2 * len(PHASES))))
        self.cells = np.memmap(path, dtype=np.float64, mode="r+")

    def clear(self) -> None:
        self.cells[:] = 0

    @property
    def phase(self) -> str:
        return PHASES[int(self.cells[0])]

    @property
    def saved(self) -> int:
        return int(self.cells[1])

    def entries(self, phase: str) -> int:
        return int(self.cells[2 + PHASES.index(phase)])

    def mean_seconds(self, phase: str) -> float:
        return float(self.cells[2 + len(PHASES) + PHASES.index(phase)]) / max(1, self.entries(phase))

    def wrapped(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that notes its phase while it runs, and the one around it afterwards."""
        number = PHASES.index(phase)

        def noted(*args: Any, **options: Any) -> Any:
            around, began = self.cells[0], time.perf_counter()
            self.cells[0] = number
            self.cells[2 + number] += 1
            result = function(*args, **options)
            self.cells[2 + len(PHASES) + number] += time.perf_counter() - began
            self.cells[0] = around
            return result

        return noted


def follow(trace: Trace, toy: Any) -> None:
    """Note every phase of the loop that `toy.run` starts in this process."""
    from mokamm.training import checkpoint
    from mokamm.training.loop import Loop
    from mokamm.training.watch import Watch

    for owner, name, phase in (
        (toy, "begin", "resume"), (checkpoint, "restore", "resume"), (Watch, "__init__", "resume"),
        (Loop, "run", "between"), (Loop, "_step", "step"), (Watch, "record", "log"), (Loop, "_validate", "validation"),
        (checkpoint, "save", "save"), (checkpoint, "write_manifest", "manifest"),
        (checkpoint, "put_in_place", "rename"), (checkpoint, "rotate", "rotation"), (checkpoint, "write_final", "final"),
    ):  # fmt: skip
        setattr(owner, name, trace.wrapped(phase, getattr(owner, name)))
    traced = checkpoint.save

    def save(run: Path, state: Any, *args: Any) -> Path:
        folder = traced(run, state, *args)
        trace.cells[1] = state.step
        return folder

    checkpoint.save = save
