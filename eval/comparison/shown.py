"""How far a plan is, for people: trainings and tests done of all, the time left, what is running."""

from __future__ import annotations

import sys
from typing import Any

from eval.comparison.progress import Progress


class Shown:
    """How far the plan is, on standard error: a bar on a terminal, else a line for each task that has ended."""

    def __init__(self, progress: Progress, jobs: int) -> None:
        self.progress, self.jobs = progress, jobs
        self.bar: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]} left"),
                TextColumn("{task.description}"),
            )
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task("starting", total=1, left="?")
            self.bar.start()

    def watch(self, state: str) -> None:
        if self.bar:
            done, total = self.counts()
            self.bar.update(self.task, completed=done, total=total, description=state, left=self.time_left())

    def tell(self, line: str) -> None:
        done, total = self.counts()
        line = f"[{done}/{total}, {self.time_left()} left] {line}"
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()

    def counts(self) -> tuple[int, int]:
        """Trainings and evaluations done, and all of them."""
        progress = self.progress
        scored = sum(map(progress.scored, filter(progress.finished, progress.known)))
        done = len(progress.known) + scored + len(progress.unscored)
        return done, done + sum(progress.left().values())

    def time_left(self) -> str:
        """By the mean time of what has been run, here or by an earlier start of the plan."""
        from mokamm.training.watch import duration

        progress, left = self.progress, self.progress.left()
        earlier = [took for outcome in progress.known.values() if (took := outcome.figures.get("seconds")) is not None]
        trained = progress.seconds.get("train") or earlier
        if not trained:
            return "?"
        mean = sum(trained) / len(trained)
        scored = progress.seconds.get("evaluate", [])
        of_test = sum(scored) / len(scored) if scored else mean / 2
        return duration((left["train"] * mean + left["evaluate"] * of_test) / self.jobs)
