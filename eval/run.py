"""Let a trained run answer a benchmark, score the answers, keep both.

    [deepspeed|python] eval/run.py BENCHMARK|all RUN [--limit N] [--control blind|shuffle|base|adapter:NAME] [--json]

    RUN/config.yaml --> jobs (which benchmark, which files) --> model, loaded once --> answers --> metrics --> report
    RUN/predictions/NAME[.CONTROL].jsonl            one line a row, in the order of the annotation file
    RUN/predictions/NAME[.CONTROL].metrics.json     score, interval, counts, settings; shares lie between 0 and 1
    RUN/report/                                     report.md with plots; examples/NAME[.CONTROL].html

Where the annotation files lie is said by the run's `evaluation.benchmarks`, or by --path and --media-dir for one
benchmark. Decoding is greedy. All rows count; what cannot be read or parsed is wrong and counted. With --json, standard
output holds exactly one object: the metrics of the one benchmark, or {"run", "control", "benchmarks": {name: metrics}}
for several. Everything else goes to standard error.

Answers are kept as they come (eval/journal.py): after a kill the same command goes on from them, also with another
number of processes; once it has finished, the same command begins anew. Under a launcher the rows are divided over the
ranks (eval/ranks.py), and rank 0 scores, writes and prints.

Exit codes: 0 done; 2 a mistake told in one message; 75 another rank went away, 130 Ctrl-C: the same command
goes on.

Cost: the model is loaded once by each rank; media pass the frozen encoders once a clip where the run has a feature cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.schema import Sample, UserError
from eval.benchmarks import BENCHMARKS, Benchmark, Row
from eval.controls import CONTROLS, Control
from eval.generation import Ask, answer_batches, by_tokens, make_batches, remaining
from eval.jobs import Job, plan_jobs
from eval.journal import Journal, check_whole, digest_of, fill, rows_digest
from eval.printing import print_metrics
from eval.ranks import check_alike, join, told
from mokamm.arguments import at_least_one
from mokamm.config import RunConfig, find_path, load_run_config
from mokamm.machine import installed
from mokamm.mistakes import is_users
from mokamm.names import ROUTED
from mokamm.quiet import outlive_readers, quiet, stdout_kept_clean
from mokamm.training.disk import put_aside, replacing, writing
from mokamm.training.launch import leave, rank_here

if TYPE_CHECKING:
    from mokamm.model import MultimodalLM
    from mokamm.training.launch import Ranks

LIBRARIES = ("torch", "transformers", "peft")
ADVICE = "make room or allow it, then start the same command again: it goes on from the answers that are kept"


@dataclass
class Work:
    """A job with its rows, and where their answers are kept as they come."""

    job: Job
    rows: list[Row]
    stem: str  # of its files: name and control
    journal: Journal
    metrics: dict[str, Any] | None = None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval/run.py",
        description="Score a run on a benchmark.",
        epilog=f"benchmarks: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument(
        "benchmark", help="a benchmark's name, or that of an entry of the run's evaluation.benchmarks, or 'all' of them"
    )
    parser.add_argument("run", type=Path, help="folder of a finished run (holds config.yaml and final/)")
    parser.add_argument("--limit", type=at_least_one, help="the first N rows only")
    parser.add_argument("--control", metavar="|".join(CONTROLS), help="the same rows with something taken away")
    parser.add_argument("--batch-size", type=at_least_one, help="default: evaluation.batch_size of the run")
    parser.add_argument("--max-new-tokens", type=at_least_one, help="default: evaluation.max_new_tokens of the run")
    parser.add_argument("--path", help="annotation file, instead of the one that the run names")
    parser.add_argument("--media-dir", help="folder of its media (default: that of --path)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the benchmark, such as circular=true"
    )
    parser.add_argument("--base", help="the LLM's hub id or folder, where it is not where the run was trained")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    # the deepspeed launcher adds it
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.media_dir and not args.path:
        parser.error("--media-dir goes with --path")
    return args


# ---- model -----------------------------------------------------------------------------------------------------------


def check_control(config: RunConfig, control: Control) -> None:
    """Raise UserError, before anything is loaded, where a control has no meaning for this run."""
    if control.kind in ("blind", "shuffle") and not config.model.modalities:
        raise UserError(f"control {control.name}: the run is of text alone, there are no media to take away")
    if control.kind == "base" and config.model.modalities and not config.training.init_folders:
        raise UserError(
            "control base: the run began without the projectors of a stage 1 (training.init_from is empty), "
            "so that there is nothing to go back to"
        )
    if control.kind == "adapter" and config.adapter.method not in ROUTED:
        raise UserError(
            f"control {control.name}: the run's method '{config.adapter.method}' has one path for all modalities; "
            f"this control needs one of: {', '.join(ROUTED)}"
        )


def load_model(run: Path, config: RunConfig, control: Control, base: str | None, device: Any) -> MultimodalLM:
    """The run's model, once for all benchmarks; under the control `base`, without anything that its stage 2 learned."""
    quiet()
    if control.kind != "base":
        from mokamm.model import MultimodalLM

        return MultimodalLM.from_run(run, base=base, device=device)
    from mokamm.build import build_model, settle

    plain = config.model_copy(deep=True)
    plain.adapter.method = "none"
    settle(plain, base)
    return build_model(plain, device)


# ---- one benchmark ---------------------------------------------------------------------------------------------------


def asker(model: MultimodalLM, config: RunConfig, job: Job, control: Control, max_new_tokens: int | None = None) -> Ask:
    """What answers a batch of the job's samples. max_new_tokens: where the run's own is not to be taken."""
    from mokamm.build import media_loader

    loader = media_loader(job.media_dir, config.data)

    def ask(samples: list[Sample]) -> list[str]:
        batch = control.reroute(model.prompt_batch(samples, loader), config.model.modality_names)
        return model.generate(batch, max_new_tokens)

    return ask


def write_results(folder: Path, stem: str, benchmark: Benchmark, rows: list[Row], metrics: dict[str, Any]) -> None:
    lines = (json.dumps(benchmark.to_json(row), ensure_ascii=False) for row in rows)
    with writing(folder, ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        keep_whole(folder, stem, metrics["settings"]["limit"])
        _write(folder / f"{stem}.jsonl", "".join(line + "\n" for line in lines))
        _write(folder / f"{stem}.metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")


def keep_whole(folder: Path, stem: str, limit: int | None) -> None:
    """Answers to all rows, which may have taken a night, do not give way to those of a look at the first few."""
    names = [f"{stem}.jsonl", f"{stem}.metrics.json"]
    if limit is None or not all((folder / name).is_file() for name in names):
        return
    with suppress(ValueError, KeyError, TypeError):
        if json.loads((folder / names[1]).read_text())["settings"]["limit"] is None:
            place = put_aside(folder, names)
            print(f"note: {stem}: the answers to all rows are now in {place}", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def settings_of_model(args: argparse.Namespace, config: RunConfig, control: Control) -> dict[str, Any]:
    """All of the model that changes the answers, for the journal."""
    from mokamm.init_from import weights_folder
    from mokamm.weights import fingerprint, trained_fingerprint

    base = args.base or config.model.llm.path
    folder = find_path(base)
    trained = [args.run / "final"] if control.kind != "base" else map(weights_folder, config.training.init_folders)
    return {
        "weights": digest_of([trained_fingerprint(weights) for weights in trained]),
        "config": digest_of({k: v for k, v in config.to_dict().items() if k not in ("evaluation", "versions")}),
        "base": fingerprint(folder) if folder.is_dir() else f"{base} {config.model.llm.revision}",
        "control": control.name,
        "max_new_tokens": args.max_new_tokens or config.evaluation.max_new_tokens,
        "decoding": "greedy",
        "versions": installed(LIBRARIES),
    }


def settings_of_rows(job: Job, rows: list[Row]) -> dict[str, Any]:
    """All that is asked, for the journal."""
    return {
        "benchmark": job.benchmark.name,
        "rows": rows_digest(rows),
        "media_dir": str(job.media_dir.absolute()),
        "limit": job.limit,
        "options": job.options,
    }


def evaluate(args: argparse.Namespace) -> list[Work]:
    """Everything behind the command line but the report: each benchmark answered, scored, written (by rank 0)."""
    config = load_run_config(args.run)
    control = Control.named(args.control, config.model.modality_names)
    check_control(config, control)
    loaded = [(job, job.load(control)) for job in plan_jobs(config, args)]
    ranks = join(config)
    with told(ranks):
        works = prepare(args, config, control, loaded, ranks)
        model = load_model(args.run, config, control, args.base, ranks.device)
        for work in works:
            answer(args, config, control, work, model, ranks)
        ranks.barrier()
    for work in works if ranks.main else []:
        work.journal.remove()
    return works


def prepare(
    args: argparse.Namespace, config: RunConfig, control: Control, loaded: list[tuple[Job, list[Row]]], ranks: Ranks
) -> list[Work]:
    """Journals for all jobs, the same on every rank; what lies about of other settings is told."""
    from mokamm.training.launch import check_shared

    predictions = args.run / "predictions"
    model = settings_of_model(args, config, control)
    works = []
    for job, rows in loaded:
        stem = job.name + control.suffix
        journal = Journal(predictions, stem, model | settings_of_rows(job, rows))
        works.append(Work(job, rows, stem, journal))
    check_alike(ranks, {f"{work.stem} {key}": value for work in works for key, value in work.journal.settings.items()})
    if ranks.main:
        with writing(predictions, ADVICE):
            predictions.mkdir(parents=True, exist_ok=True)
        for note in [note for work in works for note in work.journal.others()]:
            print(note, file=sys.stderr)
    ranks.barrier()
    check_shared(predictions, ranks, "the run folder")
    return works


def answer(
    args: argparse.Namespace, config: RunConfig, control: Control, work: Work, model: MultimodalLM, ranks: Ranks
) -> None:
    """This rank's share of a job; then, on rank 0, the whole of it is scored and written."""
    start = time.monotonic()
    job, rows, journal = work.job, work.rows, work.journal
    settings = {"batch_size": args.batch_size or config.evaluation.batch_size}
    batches = make_batches(rows, settings["batch_size"], by_tokens(model.processor.estimate_length))
    # what could not be used is tried again: its media may have come meanwhile
    before = ranks.shared(lambda: {index for index, (_, error) in journal.read().items() if error is None})
    if before and ranks.main:
        print(f"{work.stem}: {len(before)} of {len(rows)} rows were answered before a stop", file=sys.stderr)
    ask = asker(model, config, job, control, args.max_new_tokens)
    share = f" (rank 0 of {ranks.world})" if ranks.world > 1 else ""
    # folded as in chat: the same sample gets the same answer; but a path that is switched off cannot be folded in
    with nullcontext() if control.kind == "adapter" else model.folded():
        answer_batches(
            ask,
            remaining(batches, before, ranks.rank, ranks.world),
            lambda batch: keep(journal, batch, ranks.rank),
            work.stem + share if ranks.main else None,
        )
    journal.close()
    ranks.barrier()
    if not ranks.main:
        return
    answers = journal.read()
    check_whole(rows, answers)
    fill(rows, answers)
    settings |= {"ranks": ranks.world, "answered_before": len(before), "seconds": round(time.monotonic() - start, 2)}
    work.metrics = score(args, work, settings)
    write_results(args.run / "predictions", work.stem, job.benchmark, rows, work.metrics)
    warn_of_bad_rows(job.name, rows)


def keep(journal: Journal, batch: Sequence[Row], rank: int) -> None:
    with writing(journal.folder, ADVICE):
        journal.add(batch, rank)


def score(args: argparse.Namespace, work: Work, settings: dict[str, Any]) -> dict[str, Any]:
    """The metrics of an answered job, with the settings that they were reached under."""
    job, journalled = work.job, work.journal.settings
    known = {key: journalled[key] for key in ("limit", "options", "max_new_tokens", "decoding", "versions")}
    settings = {"run": str(args.run), "annotations": str(job.path), **known, **settings}
    metrics = {**job.benchmark.score(work.rows), "control": journalled["control"], "settings": settings}
    return {"name": job.name, **metrics}


def run(args: argparse.Namespace, report: bool = False) -> dict[str, dict[str, Any]]:
    """The metrics by name; empty but on rank 0. report: write the run's report anew, and pages of examples."""
    works = evaluate(args)
    if report and rank_here() == 0:
        with writing(args.run / "report", f"the metrics are whole; python -m mokamm.report {args.run} writes it again"):
            write_pages(args.run, works)
    return {work.job.name: work.metrics for work in works if work.metrics is not None}


def write_pages(run_folder: Path, works: list[Work]) -> None:
    """A page of examples for each benchmark, and report.md, which links them."""
    from eval.examples import Subject, write_examples
    from mokamm.build import media_loader
    from mokamm.report import write_report

    config = load_run_config(run_folder)
    for work in works:
        job = work.job
        loader = media_loader(job.media_dir, config.data)
        subject = Subject(job.benchmark, job.name, (work.metrics or {})["control"], work.metrics or {})
        write_examples(run_folder / "report" / "examples" / f"{work.stem}.html", subject, work.rows, loader)
    write_report(run_folder)


def warn_of_bad_rows(name: str, rows: list[Row]) -> None:
    reasons = [row.error for row in rows if row.error is not None]
    if reasons:
        count = f"{len(reasons)} of {len(rows)} rows could not be used and count as wrong"
        print(f"warning: {name}: {count}; the first: {reasons[0]}", file=sys.stderr)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        with stdout_kept_clean(args.json or rank_here() > 0):
            results = run(args, report=True)
    except KeyboardInterrupt:
        if rank_here() == 0:
            print("stopped; the same command goes on from the answers that are kept", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_users(error):
            raise
        tell(error)
        return getattr(error, "exit_code", 2)
    if rank_here() > 0:
        return 0
    if args.json:
        several = {"run": str(args.run), "control": args.control, "benchmarks": results}
        print(json.dumps(*(results.values() if args.benchmark != "all" and len(results) == 1 else [several])))
    else:
        print_metrics(results, str(args.run) + (f", control: {args.control}" if args.control else ""))
        print(f"predictions and metrics: {args.run / 'predictions'}\nreport: {args.run / 'report' / 'report.md'}")
    return 0


def tell(error: Exception) -> None:
    """A rank's mistake; mostly all ranks find the same, and rank 0's word ends the command before the others speak."""
    rank = rank_here()
    if rank:
        time.sleep(3)
    print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    outlive_readers()
    code = main()
    leave(code)
    sys.exit(code)
