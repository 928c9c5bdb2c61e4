"""How much faster eval/run.py answers than a plain loop:  python eval/speed/generation.py RUN [--limit 100] [--json]

The same trained run answers the first rows of each of its benchmarks in three ways, in turns, in one process:

    one by one   a plain loop of `model.generate([sample])`, which folds MokA's text path for each call, as chat does
    folded once  the same loop inside one `model.folded()`
    eval/run.py  its own functions: sorted by tokens, in batches, answers written to a journal as they come

All read the same feature cache, filled by the round that warms up, and give up to the same number of tokens. Answers are
compared row by row. Seconds are of the processor, this process's own work, on a CPU that others use too; on a GPU, of the
wall. The result is also written to eval/speed/results/generation.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.speed.reporting import RESULTS, keep, surroundings
from mokamm.arguments import at_least_one
from mokamm.quiet import stdout_kept_clean


def one_by_one(model: Any, rows: list[Any], loader: Any, tokens: int) -> dict[int, str]:
    return {row.index: model.generate([row.sample], tokens, loader=loader)[0] for row in rows}


def folded_once(model: Any, rows: list[Any], loader: Any, tokens: int) -> dict[int, str]:
    with model.folded():
        return one_by_one(model, rows, loader, tokens)


def as_evaluated(model: Any, rows: list[Any], ask: Any, batch_size: int) -> dict[int, str]:
    """As eval/run.py does it on one rank."""
    from eval.generation import answer_batches, by_tokens, make_batches, remaining
    from eval.journal import Journal

    with tempfile.TemporaryDirectory() as folder, model.folded():
        journal = Journal(Path(folder), "speed", {})
        batches = make_batches(rows, batch_size, by_tokens(model.processor.estimate_length))
        answer_batches(ask, remaining(batches, journal.read()), journal.add, None)
        journal.close()
        return {index: text for index, (text, _) in journal.read().items()}


def measure(model: Any, config: Any, job: Any, repeats: int, batch_size: int) -> dict[str, Any]:
    """Seconds of all ways for one benchmark, medians, and whether they answer alike."""
    import time

    from eval.controls import Control
    from eval.run import asker
    from eval.speed.timing import in_turns
    from mokamm.build import media_loader

    tokens = config.evaluation.max_new_tokens
    rows = [row for row in job.load(Control()) if row.sample is not None and row.error is None]
    loader = media_loader(job.media_dir, config.data)
    ask = asker(model, config, job, Control(), tokens)
    answers: dict[str, dict[int, str]] = {}

    def keeping(name: str, function: Callable[[], dict[int, str]]) -> Callable[[], None]:
        return lambda: answers.__setitem__(name, function())

    ways = {
        "one by one": keeping("one by one", lambda: one_by_one(model, rows, loader, tokens)),
        "folded once": keeping("folded once", lambda: folded_once(model, rows, loader, tokens)),
        "eval/run.py": keeping("eval/run.py", lambda: as_evaluated(model, rows, ask, batch_size)),
    }
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    taken = in_turns(ways, repeats, clock)
    seconds = {name: sorted(times)[len(times) // 2] for name, times in taken.items()}
    one = answers["one by one"]
    return {
        "benchmark": job.name,
        "rows": len(rows),
        "tokens": sum(len(model.tokenizer(text)["input_ids"]) for text in one.values()),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "ratios": ratios(seconds),
        "other_answers": sum(one[index] != other.get(index) for other in answers.values() for index in one),
    }


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """How many times as long each loop takes as eval/run.py."""
    return {name: round(value / seconds["eval/run.py"], 2) for name, value in seconds.items() if name != "eval/run.py"}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    from eval.jobs import plan_jobs
    from mokamm.config import load_run_config
    from mokamm.model import MultimodalLM

    config = load_run_config(args.run)
    asked = {"benchmark": "all", "path": None, "option": [], "limit": args.limit, "media_dir": None}
    jobs = plan_jobs(config, argparse.Namespace(**asked))
    batch_size = args.batch_size or config.evaluation.batch_size
    model = MultimodalLM.from_run(args.run)
    args.device = model.device.type
    found = [measure(model, config, job, args.repeats, batch_size) for job in jobs]
    whole = {name: sum(part["seconds"][name] for part in found) for name in found[0]["seconds"]}
    args.run, args.batch_size = args.run.name, batch_size
    words = ["--repeats", str(args.repeats), *(["--limit", str(args.limit)] if args.limit else [])]
    return {
        **surroundings("generation.py", args, [f"runs/{args.run}", *words]),
        "benchmarks": found,
        "rows": sum(part["rows"] for part in found),
        "seconds": {name: round(value, 2) for name, value in whole.items()},
        "ratios": ratios(whole),
        "other_answers": sum(part["other_answers"] for part in found),
    }


def print_table(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(found["seconds"])
    table = Table("benchmark", "rows", *(f"{name}, s" for name in names), "times as long", "other answers")
    for part in [*found["benchmarks"], {**found, "benchmark": "all"}]:
        seconds = (f"{part['seconds'][name]:.2f}" for name in names)
        times = " / ".join(f"{ratio:.2f}" for ratio in part["ratios"].values())
        table.add_row(part["benchmark"], str(part["rows"]), *seconds, times, str(part["other_answers"]))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--limit", type=at_least_one, help="rows of each benchmark (default: all)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="rounds after the one that warms up")
    parser.add_argument("--batch-size", type=at_least_one, help="default: evaluation.batch_size of the run")
    parser.add_argument("--out", type=Path, default=RESULTS / "generation.json")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with stdout_kept_clean(args.json):
        found = compare(args)
    if not keep(found, args.out, args.json):
        print_table(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
