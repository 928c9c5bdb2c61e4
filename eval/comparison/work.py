"""One run of a comparison, in a process of its own: trained as mokamm/train.py would, scored as eval/run.py would.

    train:     config --mokamm.train.run--> RUN/final --measure--> RUN/outcome.json
    evaluate:  RUN/final --eval.run--> RUN/predictions, RUN/report
    encode:    every medium of the plan's splits through the frozen encoders, into the cache

The process is forked from one that has imported everything (eval/comparison/preload.py), so that a run starts at once,
and its peak of memory is its own. What a run prints stands in RUN/log.txt. Where the comparison's own process is gone,
a run saves and stops as at a SIGTERM. Nothing here imports torch before a function is called.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eval.comparison.plan import DIVERGED, FAILED, FINISHED, Outcome
from mokamm.config import RunConfig, load_config
from mokamm.training.disk import replacing

OUTCOME, LOG = "outcome.json", "log.txt"


def train(base: Path, overrides: list[str], folder: Path, jobs: int = 1) -> None:
    """Train the run; its outcome is written whatever it is, unless a signal stopped it. jobs: runs at once, to be noted."""

    def task() -> Outcome:
        from mokamm.train import run
        from mokamm.training.stopping import BadStep

        config, start = load_config(base, overrides), None if begun else time.monotonic()
        try:
            run(config, finishing=False)
        except BadStep as error:
            return Outcome(DIVERGED, reason=str(error).partition("\n")[0])
        outcome = measured(config, folder, start)
        outcome.figures["jobs"] = jobs
        return outcome

    begun = (folder / LOG).exists()  # by a process that was stopped: the time of this one is not that of the run
    _in_process(folder, task, then=lambda outcome: write_outcome(folder, outcome, load_config(base, overrides)))


def evaluate(folder: Path) -> None:
    """Answer and score all benchmarks of a trained run."""

    def task() -> Outcome:
        from eval import run as scoring
        from mokamm.config import load_run_config
        from mokamm.training.finish import write_up

        scoring.run(scoring.parse_arguments(["all", str(folder)]))
        write_up(load_run_config(folder), folder)
        return Outcome(FINISHED)

    _in_process(folder, task, then=lambda outcome: sys.exit(0 if outcome.status == FINISHED else 1))


def encode(base: Path, overrides: list[str], folder: Path) -> None:
    """Fill the cache, so that no run's time or memory holds the encoders' work."""

    def task() -> Outcome:
        from data.schema import BadSample
        from mokamm.build import build_model

        config = load_config(base, overrides)
        if config.data.cache is None:
            return Outcome(FINISHED)
        model = build_model(config, "cpu" if config.training.use_cpu else None)
        seen: set[tuple[str, ...]] = set()
        for sample, loader in _samples(config, model.processor):
            media = (str(loader.media_dir), *(f"{part.modality} {part.path}" for part in sample.media))
            if media not in seen:
                seen.add(media)
                with suppress(BadSample):  # left to the runs, which tell of it
                    model.perception.fill(model.prompt_batch([sample], loader))
        return Outcome(FINISHED)

    _in_process(folder, task, then=lambda outcome: sys.exit(0 if outcome.status == FINISHED else 1))


def _samples(config: RunConfig, processor: Any) -> Iterator[tuple[Any, Any]]:
    """Every readable row of all splits, with the loader of its media."""
    from data.schema import BadSample
    from eval.jobs import job_of
    from mokamm.build import media_loader
    from mokamm.training.corpus import open_parts

    for part in open_parts(config, processor, "train") + open_parts(config, processor, "validation"):
        process: Any = part.process
        for row in range(len(part.rows)):
            with suppress(BadSample):
                yield part.rows[row], process.loader
    for job in [job_of(config, entry) for entry in config.evaluation.benchmarks]:
        loader = media_loader(job.media_dir, config.data)
        rows = job.benchmark.load(job.path, job.limit, job.options, job.media_dir)
        yield from ((row.sample, loader) for row in rows if row.sample is not None)


# ---- outcomes --------------------------------------------------------------------------------------------------------


def measured(config: RunConfig, folder: Path, start: float | None) -> Outcome:
    """What a trained run's folder says of it; diverged where its validation loss is no number. start: of its one process,
    by time.monotonic; None where it took several, so that this one cannot tell how long it took."""
    import torch
    import yaml

    from mokamm.training.watch import memory_gb, read_metrics

    records = read_metrics(folder / "metrics.jsonl")
    validation = final_validation(records, config)
    step = int(validation["step"])
    figures = {
        "trained_parameters": yaml.safe_load((folder / "config.yaml").read_text())["versions"]["trained_parameters"],
        "calibration_steps": calibration_steps(records),
        "step_seconds": step_seconds(records),
        "memory_gb": round(memory_gb(), 4),
        "checkpoint_bytes": _bytes(folder / f"checkpoint-{step}"),
        "adapter_bytes": sum(_bytes(folder / "final" / part) for part in ("adapter", "llm")),
        "seconds": None if start is None else round(time.monotonic() - start, 2),
        "processor_seconds": None if start is None else round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 2),
        "threads": torch.get_num_threads(),
    }
    finite = math.isfinite(validation["loss"])
    reason = "" if finite else "the validation loss is not a number"
    return Outcome(FINISHED if finite else DIVERGED, reason, validation if finite else {}, figures)


def final_validation(records: list[dict[str, Any]], config: RunConfig) -> dict[str, float]:
    """The validation of the weights in final/: the best one, or the last (training.load_best_model_at_end)."""
    from mokamm.training.loop import better

    best: dict[str, float] | None = None
    for found in (record for record in records if record["kind"] == "validation"):
        if not config.training.load_best_model_at_end or better(found, best, config.training.metric_for_best_model):
            best = found
    if best is None:
        raise ValueError("metrics.jsonl holds no validation")
    return {key: best[key] for key in ("step", "loss", "accuracy", "samples", "missing")}


def calibration_steps(records: list[dict[str, Any]]) -> int:
    """The steps of a first phase that went before the run's own (mokamm/training/two_phase.py)."""
    return sum(record["steps"] for record in records if record["kind"] == "calibration")


def step_seconds(records: list[dict[str, Any]]) -> float | None:
    """The median time of a step: over the stretches between two log lines, without the first, which warms up."""
    lines = [record for record in records if record["kind"] == "train"]
    means = [line["seconds"] / (line["step"] - before["step"]) for before, line in itertools.pairwise(lines)]
    return statistics.median(means) if means else None


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What makes a finished run the planned one: all of its configuration but where it lies and which libraries it met."""
    tree = config.to_dict()
    del tree["versions"], tree["training"]["output_dir"]
    return tree


def as_of_now(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that an older version wrote, with the defaults of what it did not know."""
    tree = {**settings, "training": {**settings.get("training", {}), "output_dir": "-"}}
    try:
        return settings_of(RunConfig.model_validate(tree))
    except ValidationError:
        return settings


def write_outcome(folder: Path, outcome: Outcome, config: RunConfig) -> None:
    outcome.settings = settings_of(config)
    with replacing(folder / OUTCOME) as beside:
        beside.write_text(json.dumps(asdict(outcome), indent=1) + "\n")


def read_outcome(folder: Path) -> Outcome | None:
    """None where the run has not ended yet, or failed."""
    try:
        outcome = Outcome(**json.loads((folder / OUTCOME).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return outcome if outcome.status != FAILED else None


# ---- the process -----------------------------------------------------------------------------------------------------


def _in_process(folder: Path, task: Callable[[], Outcome], then: Callable[[Outcome], object]) -> None:
    """Do it with its own log; a user's mistake or a bug becomes an outcome `failed`, a signal the process's exit code."""
    from mokamm.mistakes import is_users
    from mokamm.training.stopping import Stopped

    multiprocessing.set_start_method(None, force=True)  # the platform's own, for the data workers, as elsewhere
    folder.mkdir(parents=True, exist_ok=True)
    _log_to(folder / LOG)
    _stop_with_parent()
    try:
        outcome = task()
    except Stopped as stopped:
        print(stopped, flush=True)
        os._exit(stopped.code)
    except Exception as error:
        if not is_users(error):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        outcome = Outcome(FAILED, reason=f"{type(error).__name__}: {error}".partition("\n")[0])
    sys.stdout.flush()
    sys.stderr.flush()
    then(outcome)


def _log_to(path: Path) -> None:
    """Standard output and error of this process and of those it starts, from here on."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _stop_with_parent() -> None:
    """SIGTERM to oneself once the comparison's process has gone: the training saves and ends."""
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
