"""Which method is better? Train a list of them with equal data and steps, each at a rate of its own, and test.

    python eval/compare.py CONFIG [--out DIR] [--jobs N] [--methods A,B] [--list] [--report-only] [--json]

    CONFIG --check--> plan: every rate on one seed --validation--> the best rate, several seeds --> the test split, once
    DIR/runs/METHOD/rate-R-seed-S/     a whole run each, as mokamm/train.py leaves it, with log.txt and outcome.json
    DIR/report/                        report.md with rates.png and parameters.png, results.json with every raw figure

CONFIG: see eval/comparison/settings.py and configs/compare/. The same command goes on where an earlier one was stopped
(Ctrl-C, SIGTERM, a crash); finished runs are not run again. A run that diverges is a result of its rate. Exit codes: 0
all done; 1 some runs failed, as the report says; 2 a mistake in the configuration, told before the first run; 130 or
143 stopped. Cost: the runs; the report takes seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eval.comparison import pool
from eval.comparison.plan import FAILED
from eval.comparison.progress import Progress, look
from eval.comparison.settings import Comparison, load_comparison
from eval.comparison.shown import Shown
from mokamm.arguments import at_least_one, started_as
from mokamm.mistakes import tell
from mokamm.quiet import stdout_kept_clean
from mokamm.training.disk import hold, writing
from mokamm.training.world import make_world


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval/compare.py", description="Compare methods, each at its own best rate.")
    parser.add_argument("config", type=Path, help="YAML file, as in configs/compare/")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of runs and report (default: the output_dir)")
    parser.add_argument(
        "--jobs", type=at_least_one, default=1, metavar="N", help="runs at once, which share the cores (1)"
    )
    parser.add_argument("--methods", metavar="A,B", help="these methods only; the reference must be among them")
    parser.add_argument("--list", action="store_true", help="print the plan and what of it is done, and run nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there, and run nothing")
    parser.add_argument("--json", action="store_true", help="the results, or the plan, as one JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return compare(args)
    except (KeyboardInterrupt, pool.Terminated) as stopped:
        print(f"stopped; to go on:\n  {shlex.join([*started_as(), *sys.argv[1:]])}", file=sys.stderr)
        return 143 if isinstance(stopped, pool.Terminated) else 130
    except Exception as error:
        return tell(error)


def compare(args: argparse.Namespace) -> int:
    with stdout_kept_clean(args.json):
        comparison = load_comparison(args.config, args.out, args.methods.split(",") if args.methods else None)
        looked = args.list or args.report_only
        progress = look(comparison) if looked else run_all(comparison, args.jobs)
    if not args.list:
        return report(progress, args)
    print_plan(progress, args.json)
    return 0


def run_all(comparison: Comparison, jobs: int) -> Progress:
    """The whole plan, as far as it is not done yet."""
    with writing(comparison.out, "choose another folder (--out)"):
        comparison.out.mkdir(parents=True, exist_ok=True)
    lock = hold(comparison.out)  # noqa: F841 - held until the runs are done
    config = comparison.run_config(comparison.any_run())
    if config.data.world:
        make_world(config.data.world)
    config.check_files(world_is_made=True)
    progress = look(comparison)
    pool.share_cores(jobs)
    shown = Shown(progress, jobs)
    try:
        pool.carry_out(progress, jobs, shown.tell, shown.watch)
    finally:
        shown.close()
    return progress


def report(progress: Progress, args: argparse.Namespace) -> int:
    from eval.comparison.report import write_report
    from eval.comparison.results import gather

    results = gather(progress)
    path = write_report(results, progress.comparison.out / "report")
    if args.json:
        print(json.dumps(results, ensure_ascii=False, allow_nan=False))
    else:
        print(path.read_text())
        print(f"report: {path}")
    failed = [f"{run}: {o.reason}" for run, o in progress.known.items() if o.status == FAILED]
    failed += [f"{run}: {reason}" for run, reason in progress.unscored.items()]
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def print_plan(progress: Progress, as_json: bool) -> None:
    """Every run with its state and its command; rates chosen later are not foreseen."""
    comparison, left, runs = progress.comparison, progress.left(), []
    for run in dict.fromkeys([*progress.known, *(task.run for task in progress.ready())]):
        outcome = progress.known.get(run)
        state = outcome.status if outcome else "to do"
        state += ", scored" if outcome and progress.scored(run) else ""
        words = ["python", "mokamm/train.py", str(comparison.config.base), *comparison.overrides(run)]
        runs.append((run, {"state": state, "command": shlex.join(words)}))
    done = len(progress.known)
    if as_json:
        print(json.dumps({"runs": [{**asdict(run), **told} for run, told in runs], "done": done, "left": left}))
        return
    for run, told in runs:
        print(f"{run}: {told['state']}\n  {told['command']}")
    print(f"{done} runs done; {left['train']} trainings and {left['evaluate']} tests to do, at least")


if __name__ == "__main__":
    sys.exit(main())
