"""Let a trained run answer a benchmark, score the answers, keep both.

    python eval/run.py BENCHMARK|all RUN [--limit N] [--control blind|shuffle|base|adapter:NAME] [--json]

    RUN/config.yaml --> jobs (which benchmark, which files) --> model, loaded once --> answers --> metrics
    RUN/predictions/BENCHMARK[.CONTROL].jsonl            one line a row, in the order of the annotation file
    RUN/predictions/BENCHMARK[.CONTROL].metrics.json     score, interval, counts, settings; shares lie between 0 and 1

Where the annotation files lie is said by the run's `evaluation.benchmarks`, or by --path and --media-dir for one
benchmark. Decoding is greedy. All rows count; what cannot be read or parsed is wrong and counted. With --json, standard
output holds exactly one object: the metrics of the one benchmark, or {"run", "control", "benchmarks": {name: metrics}}
for `all`. Everything else goes to standard error.

Cost: the model is loaded once; media pass the frozen encoders once a clip where the run has a feature cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.schema import Sample, UserError
from eval.benchmarks import BENCHMARKS, Benchmark, Row, find_benchmark
from eval.controls import CONTROLS, Control
from eval.generation import Ask, answer_rows
from eval.printing import print_metrics, stdout_kept_clean
from mokamm.config import BenchmarkConfig, RunConfig, load_run_config
from mokamm.mistakes import is_users

if TYPE_CHECKING:
    from mokamm.model import MultimodalLM

LIBRARIES = ("torch", "transformers", "peft")
ROUTED = ("moka", "multi_lora")  # methods with a path for each modality


@dataclass(frozen=True)
class Job:
    """One benchmark to run, with its files."""

    benchmark: Benchmark
    path: Path
    media_dir: Path
    limit: int | None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval/run.py",
        description="Score a run on a benchmark.",
        epilog=f"benchmarks: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("benchmark", help="a benchmark's name, or 'all': those of the run's evaluation.benchmarks")
    parser.add_argument("run", type=Path, help="folder of a finished run (holds config.yaml and final/)")
    parser.add_argument("--limit", type=int, help="the first N rows only")
    parser.add_argument("--control", metavar="|".join(CONTROLS), help="the same rows with something taken away")
    parser.add_argument("--batch-size", type=int, help="default: evaluation.batch_size of the run")
    parser.add_argument("--max-new-tokens", type=int, help="default: evaluation.max_new_tokens of the run")
    parser.add_argument("--path", help="annotation file, instead of the one that the run names")
    parser.add_argument("--media-dir", help="folder of its media (default: the folder of --path)")
    parser.add_argument("--base", help="the LLM's hub id or folder, where it is not where the run was trained")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; found {value}")
    if args.media_dir and not args.path:
        parser.error("--media-dir goes with --path")
    return args


# ---- what to run -----------------------------------------------------------------------------------------------------


def plan_jobs(config: RunConfig, args: argparse.Namespace) -> list[Job]:
    """The benchmarks asked for. Raises UserError for an unknown one, one without files, or files that are not there."""
    if args.benchmark != "all":
        find_benchmark(args.benchmark)
    if args.path:
        if args.benchmark == "all":
            raise UserError("--path belongs to one benchmark; name it instead of 'all'")
        entries = [BenchmarkConfig(benchmark=args.benchmark, path=str(Path(args.path).absolute()))]
        entries[0].media_dir = args.media_dir or str(Path(args.path).parent)
    else:
        entries = [entry for entry in config.evaluation.benchmarks if args.benchmark in ("all", entry.benchmark)]
    if not entries:
        named = ", ".join(entry.benchmark for entry in config.evaluation.benchmarks) or "none"
        raise UserError(
            f"the run names no files for '{args.benchmark}' (its evaluation.benchmarks: {named}); "
            "add --path FILE and --media-dir FOLDER, or an entry {benchmark, path, media_dir} to RUN/config.yaml"
        )
    jobs = [_job(config, entry, args.limit) for entry in entries]
    names = [job.benchmark.name for job in jobs]
    if len(set(names)) < len(names):
        raise UserError(
            f"the run's evaluation.benchmarks name one benchmark twice ({', '.join(names)}); their files would collide"
        )
    return jobs


def _job(config: RunConfig, entry: BenchmarkConfig, limit: int | None) -> Job:
    benchmark = find_benchmark(entry.benchmark)
    path, media_dir = config.locate(entry)
    if not path.is_file():
        raise UserError(f"benchmark {benchmark.name}: no such annotation file: {path}{_how_to_make(config)}")
    return Job(benchmark, path, media_dir, limit or entry.limit)


def _how_to_make(config: RunConfig) -> str:
    world = config.data.world
    if world is None:
        return ""
    command = f"python -m data.miniworld --out {world.dir} --split test --num {world.test} --seed {world.seed}"
    return f"; the run's miniature world is made by: {command}"


# ---- model -----------------------------------------------------------------------------------------------------------


def check_control(config: RunConfig, control: Control) -> None:
    """Raise UserError, before anything is loaded, where a control has no meaning for this run."""
    if control.kind == "base" and not config.training.init_folders:
        raise UserError(
            "control base: the run began without the projectors of a stage 1 (training.init_from is empty), "
            "so that there is nothing to go back to"
        )
    if control.kind == "adapter" and config.adapter.method not in ROUTED:
        raise UserError(
            f"control {control.name}: the run's method '{config.adapter.method}' has one path for all modalities; "
            f"this control needs one of: {', '.join(ROUTED)}"
        )


def load_model(run: Path, config: RunConfig, control: Control, base: str | None) -> MultimodalLM:
    """The run's model, once for all benchmarks; under the control `base`, without anything that its stage 2 learned."""
    if control.kind != "base":
        from mokamm.model import MultimodalLM

        return MultimodalLM.from_run(run, base=base)
    from mokamm.build import build_model, check_base

    plain = config.model_copy(deep=True)
    plain.adapter.method = "none"
    if base is not None:
        plain.model.llm.path, plain.model.llm.revision = base, None
    check_base(plain, named=base is not None)
    if plain.data.cache and not Path(plain.data.cache.dir).is_dir():
        plain.data.cache = None  # as from_run has it: a run that has moved starts no cache where it is now
    return build_model(plain)


# ---- one benchmark ---------------------------------------------------------------------------------------------------


def asker(model: MultimodalLM, config: RunConfig, job: Job, control: Control, max_new_tokens: int) -> Ask:
    """What answers a batch of the job's samples."""
    from mokamm.build import media_loader

    loader = media_loader(job.media_dir, config.data.limits, config.data.allow_outside)

    def ask(samples: list[Sample]) -> list[str]:
        batch = control.reroute(model.prompt_batch(samples, loader), config.model.modality_names)
        return model.generate(batch, max_new_tokens)

    return ask


def load_rows(job: Job, control: Control) -> list[Row]:
    """The rows of a job, with the samples that the model is asked under the control."""
    rows = job.benchmark.load(job.path, job.limit)
    readable = [row for row in rows if row.sample is not None]
    asked = control.apply([row.sample for row in readable if row.sample])
    for row, sample in zip(readable, asked, strict=True):
        row.sample = sample
    return rows


def write_results(folder: Path, stem: str, benchmark: Benchmark, rows: list[Row], metrics: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(benchmark.to_json(row), ensure_ascii=False) for row in rows)
    _write(folder / f"{stem}.jsonl", "".join(line + "\n" for line in lines))
    _write(folder / f"{stem}.metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    beside.replace(path)


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Everything behind the command line; metrics by benchmark."""
    config = load_run_config(args.run)
    control = Control.named(args.control, config.model.modality_names)
    check_control(config, control)
    work = [(job, load_rows(job, control)) for job in plan_jobs(config, args)]
    batch_size = args.batch_size or config.evaluation.batch_size
    max_new_tokens = args.max_new_tokens or config.evaluation.max_new_tokens
    model = load_model(args.run, config, control, args.base)
    results = {}
    for job, rows in work:
        start = time.monotonic()
        label = job.benchmark.name + control.suffix
        # folded as in chat: the same sample gets the same answer; but a path that is switched off cannot be folded in
        with nullcontext() if control.kind == "adapter" else model.folded():
            answer_rows(asker(model, config, job, control, max_new_tokens), rows, batch_size, label)
        settings = {
            "run": str(args.run),
            "annotations": str(job.path),
            "limit": job.limit,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "decoding": "greedy",
            "seconds": round(time.monotonic() - start, 2),
            "versions": {name: metadata.version(name) for name in LIBRARIES},
        }
        metrics = {**job.benchmark.score(rows), "control": control.name, "settings": settings}
        write_results(args.run / "predictions", label, job.benchmark, rows, metrics)
        warn_of_bad_rows(job.benchmark.name, rows)
        results[job.benchmark.name] = metrics
    return results


def warn_of_bad_rows(name: str, rows: list[Row]) -> None:
    reasons = [row.error for row in rows if row.error is not None]
    if reasons:
        count = f"{len(reasons)} of {len(rows)} rows could not be used and count as wrong"
        print(f"warning: {name}: {count}; the first: {reasons[0]}", file=sys.stderr)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        with stdout_kept_clean(args.json):
            results = run(args)
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        one = results.get(args.benchmark)
        print(
            json.dumps(
                one or {"run": str(args.run), "control": args.control, "benchmarks": results}, ensure_ascii=False
            )
        )
    else:
        print_metrics(results, str(args.run) + (f", control: {args.control}" if args.control else ""))
        print(f"predictions and metrics: {args.run / 'predictions'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
