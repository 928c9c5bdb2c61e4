"""The plan carried out: a process for each run, some at once, and how far it is.

A server process imports torch and all else once (eval/comparison/preload.py) and forks a fresh process for every run:
no run waits for imports, none sees what another left in memory, and one that crashes takes nobody with it. What is
finished is never run again; what was stopped goes on from its newest checkpoint; what failed is told and passed over.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from eval.comparison import work
from eval.comparison.plan import DIVERGED, FAILED, FINISHED, Outcome, stand
from eval.comparison.settings import Comparison, Run
from mokamm.config_file import ConfigError, listed

SHOWN_KEYS = 6  # differences that a message names


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

    def scored(self, run: Run) -> bool:
        """Whether all benchmarks' predictions of a run are there."""
        folder = run.folder(self.comparison.out) / "predictions"
        return all((folder / f"{name}.metrics.json").is_file() for name in self.comparison.benchmarks)

    def ready(self) -> list[Task]:
        """What can start now, in the order of the methods."""
        return [task for method in self.comparison.config.methods.values() for task in self._of(method)[0]]

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

    def _of(self, method: Any) -> tuple[list[Task], dict[str, int]]:
        """A method's tasks that can start, and how many more will follow."""
        config = self.comparison.config
        found = stand(config, method, self.known)
        finished = [run for run in found.runs if run in self.known and self.known[run].status == FINISHED]
        unscored = [run for run in finished if not self.scored(run) and run not in self.unscored]
        tasks = [Task("train", run) for run in found.todo] + [Task("evaluate", run) for run in unscored]
        pending = len([run for run in found.todo if run in found.runs]) if found.runs else len(config.seeds)
        return tasks, {"train": found.later, "evaluate": pending if found.runs or found.todo else 0}


def look(comparison: Comparison) -> Progress:
    """What lies in the folder. Raises ConfigError where a run there is not the one that the configuration asks for."""
    progress = Progress(comparison)
    different: list[str] = []
    while fresh := [task.run for task in progress.ready() if task.kind == "train" and task.run not in progress.known]:
        found = {run: work.read_outcome(run.folder(comparison.out)) for run in fresh}
        new = {run: outcome for run, outcome in found.items() if outcome is not None}
        for run, outcome in new.items():
            wanted = work.settings_of(comparison.run_config(run))
            different += [f"{run}: {line}" for line in _differences(work.as_of_now(outcome.settings), wanted)]
        progress.known |= new
        if not new:
            break
    if different:
        more = [f"and {len(different) - SHOWN_KEYS} more"] if len(different) > SHOWN_KEYS else []
        raise ConfigError(
            listed(f"{comparison.out} holds runs of another plan:", [*different[:SHOWN_KEYS], *more])
            + "\ngo back to those values, name another folder (--out DIR), or delete the runs that are not wanted"
        )
    return progress


def _differences(there: Any, wanted: Any, at: str = "") -> Iterator[str]:
    """Lines for the leaves in which two trees differ."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in {**there, **wanted}:
            yield from _differences(there.get(key), wanted.get(key), f"{at}.{key}" if at else str(key))
    elif there != wanted:
        yield f"{at} is {there!r} there, {wanted!r} now"


# ---- running ---------------------------------------------------------------------------------------------------------


def carry_out(progress: Progress, jobs: int, tell: Callable[[str], None], watch: Callable[[str], None]) -> None:
    """Run all that is left, `jobs` at once. tell: a line about what has ended; watch: called each second with the state.

    Raises KeyboardInterrupt or Terminated, with every running training saved, where this process is signalled.
    """
    comparison = progress.comparison
    context = get_context("forkserver")
    context.set_forkserver_preload(["eval.comparison.preload"])
    running: dict[Any, tuple[Task, Any, float]] = {}
    with _terminated_as_an_exception():
        try:
            if any(task.kind == "train" for task in progress.ready()):
                _start(context, Task("encode", comparison.any_run()), comparison, running, jobs)
                _collect(progress, running, tell, watch)
            while True:
                busy = {task for task, _, _ in running.values()}
                for task in [task for task in progress.ready() if task not in busy][: jobs - len(running)]:
                    _start(context, task, comparison, running, jobs)
                if not running:
                    return
                _collect(progress, running, tell, watch)
        except BaseException:
            _stop([process for _, process, _ in running.values()])
            raise


def _start(
    context: Any, task: Task, comparison: Comparison, running: dict[Any, tuple[Task, Any, float]], jobs: int
) -> None:
    folder = task.run.folder(comparison.out)
    told: tuple[Any, ...] = (comparison.base, comparison.overrides(task.run))
    target, arguments = {
        "encode": (work.encode, (*told, comparison.out)),
        "train": (work.train, (*told, folder, jobs)),
        "evaluate": (work.evaluate, (folder,)),
    }[task.kind]
    process = context.Process(target=target, args=arguments)
    process.start()
    running[process.sentinel] = (task, process, time.monotonic())


def _collect(
    progress: Progress,
    running: dict[Any, tuple[Task, Any, float]],
    tell: Callable[[str], None],
    watch: Callable[[str], None],
) -> None:
    """Wait until a task has ended, and take in what came of it."""
    while not (ended := connection.wait(list(running), timeout=1.0)):
        watch(", ".join(f"{_doing(task)} ({time.monotonic() - since:.0f} s)" for task, _, since in running.values()))
    for sentinel in ended:
        task, process, since = running.pop(sentinel)
        process.join()
        seconds = time.monotonic() - since
        progress.seconds.setdefault(task.kind, []).append(seconds)
        line = _taken_in(progress, task, process.exitcode)
        tell(f"{line} ({seconds:.0f} s)")


def _doing(task: Task) -> str:
    return {"encode": "encoding all media once", "train": str(task.run), "evaluate": f"test of {task.run}"}[task.kind]


def _taken_in(progress: Progress, task: Task, code: int) -> str:
    """Note what came of a task; a line about it."""
    folder = task.run.folder(progress.comparison.out)
    log = (progress.comparison.out if task.kind == "encode" else folder) / work.LOG
    if task.kind == "encode":
        return "media encoded" if code == 0 else f"media not encoded beforehand, see {log}"
    if task.kind == "evaluate":
        if code == 0 and progress.scored(task.run):
            return f"{task.run}: test split scored"
        progress.unscored[task.run] = f"exit code {code}, see {log}"
        return f"{task.run}: not scored: {progress.unscored[task.run]}"
    outcome = work.read_outcome(folder) or Outcome(FAILED, reason=_last_error(log, code))
    progress.known[task.run] = outcome
    if outcome.status == FINISHED:
        found = outcome.validation
        return f"{task.run}: validation loss {found['loss']:.4f}, answers right {found['accuracy']:.1%}"
    word = "diverged" if outcome.status == DIVERGED else "failed"
    return f"{task.run}: {word}: {outcome.reason}"


def _last_error(log: Path, code: int) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = next((line for line in reversed(lines) if line.startswith("error: ")), f"exit code {code}")
    return f"{said}, see {log}"


def _stop(processes: list[Any]) -> None:
    """Let every training save and end."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join()


class Terminated(Exception):
    """SIGTERM."""


@contextmanager
def _terminated_as_an_exception() -> Iterator[None]:
    def handler(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def share_cores(jobs: int) -> None:
    """So many threads for each of `jobs` runs that they use all cores; a user's OMP_NUM_THREADS is kept."""
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))


# ---- progress --------------------------------------------------------------------------------------------------------


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
        self.bar.console.print(line, markup=False, highlight=False) if self.bar else print(
            line, file=sys.stderr, flush=True
        )

    def close(self) -> None:
        if self.bar:
            self.bar.stop()

    def counts(self) -> tuple[int, int]:
        """Trainings and evaluations done, and all of them."""
        progress = self.progress
        scored = sum(progress.scored(run) for run in progress.known if progress.known[run].status == FINISHED)
        done = len(progress.known) + scored + len(progress.unscored)
        return done, done + sum(progress.left().values())

    def time_left(self) -> str:
        """By the mean time of what has been run, here or by an earlier start of the plan."""
        from mokamm.training.watch import duration

        progress, left = self.progress, self.progress.left()
        earlier = [outcome.figures.get("seconds", 0.0) for outcome in progress.known.values() if outcome.figures]
        trained = progress.seconds.get("train") or earlier
        if not trained:
            return "?"
        mean = sum(trained) / len(trained)
        scored = progress.seconds.get("evaluate", [])
        of_test = sum(scored) / len(scored) if scored else mean / 2
        return duration((left["train"] * mean + left["evaluate"] * of_test) / self.jobs)
