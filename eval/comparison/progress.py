"""What of a plan is done, read from its folder, and what can start now.

look(comparison): DIR/runs/*/outcome.json --> Progress --ready--> tasks; carry_out (pool.py) adds what comes of them
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data.schema import listed
from eval.comparison import work
from eval.comparison.plan import FINISHED, Outcome, stand
from eval.comparison.settings import Comparison, MethodConfig, Run
from mokamm.config_file import ConfigError

SHOWN = 6  # differences that a message names


@dataclass(frozen=True)
class Task:
    kind: str  # encode, train or evaluate
    run: Run


@dataclass
class Progress:
    """What is known of the plan. unscored: runs whose evaluation failed, with the reason; seconds: of tasks by kind."""

    comparison: Comparison
    known: dict[Run, Outcome] = field(default_factory=dict)
    unscored: dict[Run, str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def finished(self, run: Run) -> bool:
        """Whether a run was trained to its end."""
        return run in self.known and self.known[run].status == FINISHED

    def scored(self, run: Run) -> bool:
        """Whether all benchmarks' predictions of a run are there."""
        folder = run.folder(self.comparison.out) / "predictions"
        return all((folder / f"{name}.metrics.json").is_file() for name in self.comparison.benchmarks)

    def ready(self) -> list[Task]:
        """What can start now, in the order of the methods."""
        return [task for method in self.comparison.config.methods.values() for task in self._of(method)[0]]

    def recall(self) -> None:
        """Take in what lies in the folder of runs that are due, and of those that become so by it.

        Again after every task: where a plan has changed since, a run may become due that was carried out under the one
        before. Raises ConfigError where a run there is not the one that the configuration asks for.
        """
        different: list[str] = []
        while fresh := [task.run for task in self.ready() if task.kind == "train" and task.run not in self.known]:
            found = {run: work.read_outcome(run.folder(self.comparison.out)) for run in fresh}
            new = {run: outcome for run, outcome in found.items() if outcome is not None}
            for run, outcome in new.items():
                wanted = work.settings_of(self.comparison.run_config(run))
                different += [f"{run}: {line}" for line in _differences(work.as_of_now(outcome.settings), wanted)]
            self.known |= new
            if not new:
                break
        if different:
            raise ConfigError(
                listed(f"{self.comparison.out} holds runs of another plan:", different, most=SHOWN)
                + "\ngo back to those values, name another folder (--out DIR), or delete the runs that are not wanted"
            )

    def left(self) -> dict[str, int]:
        """How many tasks there are still, by kind; a grid that grows later is not foreseen."""
        counts = {"train": 0, "evaluate": 0}
        for method in self.comparison.config.methods.values():
            tasks, later = self._of(method)
            for task in tasks:
                counts[task.kind] += 1
            for kind, count in later.items():
                counts[kind] += count
        return counts

    def _of(self, method: MethodConfig) -> tuple[list[Task], dict[str, int]]:
        """A method's tasks that can start, and how many more will follow."""
        config = self.comparison.config
        found = stand(config, method, self.known)
        finished = filter(self.finished, found.runs)
        unscored = [run for run in finished if not self.scored(run) and run not in self.unscored]
        tasks = [Task("train", run) for run in found.todo] + [Task("evaluate", run) for run in unscored]
        pending = len([run for run in found.todo if run in found.runs]) if found.runs else len(config.seeds)
        return tasks, {"train": found.later, "evaluate": pending if found.runs or found.todo else 0}


def look(comparison: Comparison) -> Progress:
    """What lies in the folder. Raises ConfigError where a run there is not the one that the configuration asks for."""
    progress = Progress(comparison)
    progress.recall()
    return progress


def _differences(there: Any, wanted: Any, at: str = "") -> Iterator[str]:
    """Lines for the leaves in which two trees differ."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in {**there, **wanted}:
            yield from _differences(there.get(key), wanted.get(key), f"{at}.{key}" if at else str(key))
    elif there != wanted:
        yield f"{at} is {there!r} there, {wanted!r} now"
