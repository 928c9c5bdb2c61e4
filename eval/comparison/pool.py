"""The plan carried out: a process for each run, some of them at once.

A server process imports torch and all else once (eval/comparison/preload.py) and forks a fresh process for every run:
no run waits for imports, none sees what another left in memory, and one that crashes takes nobody with it. What is
finished is never run again; what was stopped goes on from its newest checkpoint; what failed is told and passed over.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from eval.comparison import work
from eval.comparison.plan import DIVERGED, FAILED, FINISHED, Outcome
from eval.comparison.progress import Progress, Task
from eval.comparison.settings import Comparison


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
                progress.recall()
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
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
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
