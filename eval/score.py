"""Score a file of predictions, without any model: eval/run.py's own, or those of the published MokA scripts.

    python eval/score.py BENCHMARK --predictions FILE [--annotations FILE] [--against FILE] [--json]

Prints the score under both rules, strict and official (eval/benchmarks/base.py), with 95 % intervals. With --json,
standard output holds one object:

    {"benchmark", "measure", "scale", "rows", "parsed", "unparsed", "duplicates", "bad", "missing", "extra", "problems",
     "rules": {"strict": {"score", "interval", "rows", "parsed", "unparsed", ...}, "official": {...}},
     "score", "interval", "predictions", "annotations", "against"?}

Scores and rates are shares between 0 and 1, except MME's (points: acc and acc+ 0 to 100, perception 0 to 2000) and
CIDEr-D (0 to 10); `scale` says which. `score` and `interval` are the strict rule's.

    rows        all rows of the file = parsed + unparsed + bad + duplicates + extra; the four counts are the strict rule's
    bad         lines that are not JSON, rows without a readable true answer, rows that could not be asked; wrong
    duplicates  rows that stand in the file again (the padding of distributed runs); the first one counts
    missing     annotations without a row in the file; wrong, and not among `rows`
    extra       rows that belong to no annotation; they do not count in the strict rule

Without --annotations, the true answers are those that the rows themselves hold. --annotations takes what the benchmark's
file in eval/benchmarks/ describes (AVE: Annotations.txt or testSet.txt).

--against FILE: another model's predictions for the same rows. `against` then holds its strict score, the difference
(this file's minus the other's) with its interval, and the p value of a paired test: signs of the units' differences
flipped at random (eval/comparison/differences.py); units are what is independent, the image for MME, the clip for AVE
and MUSIC-AVQA. Only rows that both files have are compared; the others are counted, and rows of one id that differ in
medium, question or true answer (POPE's three files count alike) are not compared, which is told.

Exit codes: 0 scored, however bad the file; 2 a mistake on the command line. Cost: linear in the file; no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.schema import UserError
from eval.benchmarks import BENCHMARKS, Benchmark, Row, find_benchmark
from eval.benchmarks.base import file_stem, total
from eval.comparison.differences import sign_flips
from eval.intervals import bootstrap_interval
from eval.predictions import NO_PREDICTION, Collected, collect, read
from eval.printing import print_rules
from mokamm.mistakes import tell
from mokamm.quiet import stdout_kept_clean


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="eval/score.py",
        description="Score a file of predictions without any model.",
        epilog=f"benchmarks: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("benchmark", help="a benchmark's name")
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="jsonl, or a JSON array")
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help="the benchmark's own file with the true answers"
    )
    parser.add_argument("--against", type=Path, metavar="FILE", help="another file of predictions: a paired test")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args(argv)


def score(name: str, predictions: Path, annotations: Path | None = None, against: Path | None = None) -> dict[str, Any]:
    """All figures of a predictions file; UserError for a benchmark or file that is not there."""
    benchmark = find_benchmark(name)
    found = read(predictions)
    options = benchmark.options_for(found)
    truths = None if annotations is None else benchmark.load(annotations, options=options)
    others = annotations is not None and benchmark.covers_other_splits(annotations, len(truths or ()))
    collected = collect(benchmark, found, truths, others)
    figures = benchmark.score(collected.rows, collected.filed)
    if not figures["parsed"]:
        collected.problems.append(f"no answer could be parsed; are these rows of {benchmark.name}?")
    del figures["metrics"]  # those of rules.strict
    result = {
        **figures,
        "rows": collected.lines,
        "duplicates": collected.duplicates,
        "bad": figures["bad"] - collected.missing + collected.broken,
        "missing": collected.missing,
        "extra": collected.extra,
        "problems": collected.problems,
        "predictions": str(predictions),
        "annotations": None if annotations is None else str(annotations),
    }
    if against is not None:
        other = collect(benchmark, read(against), truths, others)
        result["against"] = {"predictions": str(against), **compare(benchmark, collected, other)}
        collected.problems += [f"{against}: {problem}" for problem in other.problems]
    return result


# ---- a paired test ---------------------------------------------------------------------------------------------------


def compare(benchmark: Benchmark, one: Collected, other: Collected) -> dict[str, Any]:
    """Strict scores on the rows of both, their difference with its interval, and the paired test."""
    pairs = _pairs(benchmark, one, other)
    ours = benchmark.strict([row for row, _ in pairs])
    theirs = benchmark.strict([replace(row, unit=own.unit) for own, row in pairs])
    whole: dict[str, float] = defaultdict(float)
    for earned in ours:
        whole[earned.group] += earned.of
    by_unit: dict[str, float] = defaultdict(float)
    steps = []
    for a, b in zip(ours, theirs, strict=True):
        steps.append((a.points - b.points, a.of))
        by_unit[a.unit] += (a.points - b.points) / whole[a.group] if whole[a.group] else 0.0
    return {
        "score": total(theirs),
        "difference": total(ours) - total(theirs),
        "interval": bootstrap_interval(steps, [a.unit for a in ours], groups=[a.group for a in ours]),
        "p_value": sign_flips(np.array(list(by_unit.values()))),
        "test": "paired sign flips over units, two-sided",
        "rows": len(pairs),
        "units": len(by_unit),
        "rows_only_here": len(_present(one)) - len(pairs),
        "rows_only_there": len(_present(other)) - len(pairs),
    }


def _pairs(benchmark: Benchmark, one: Collected, other: Collected) -> list[tuple[Row, Row]]:
    """The rows that both files have. Rows that nothing names are paired in order, if all their truths agree."""
    named = {key: row for key, row in _present(other) if key is not None}
    alike = [(row, named[key]) for key, row in _present(one) if key in named]
    both = [(row, there) for row, there in alike if _is_same(benchmark, row, there)]
    unlike = [row.id for row, there in alike if not _is_same(benchmark, row, there)]
    one.tell("have one id in both files, but another medium, question or true answer, and are not compared", unlike)
    ours = [row for key, row in _present(one) if key is None]
    theirs = [row for key, row in _present(other) if key is None]
    if len(ours) == len(theirs) and all(a.answer == b.answer for a, b in zip(ours, theirs, strict=True)):
        both += list(zip(ours, theirs, strict=True))
    if not both:
        raise UserError(
            "--against: the two files have no row in common; rows are the same where id, media, question and true answer "
            "are, or where --annotations has them as one row"
        )
    return both


def _present(collected: Collected) -> list[tuple[Hashable, Row]]:
    """The rows that the file has, with their keys."""
    pairs = zip(collected.keys, collected.rows, strict=True)
    return [(key, row) for key, row in pairs if row.error != NO_PREDICTION]


def _is_same(benchmark: Benchmark, one: Row, other: Row) -> bool:
    """Whether two rows of one id are about the same; published rows of one key are, by all that they hold."""
    if one.published or other.published:
        return True
    if one.error is not None and other.error is not None:
        return True
    questions = {str(row.meta["question"]) for row in (one, other) if row.meta.get("question")}
    return file_stem(one.unit) == file_stem(other.unit) and len(questions) < 2 and benchmark.same_truth(one, other)


# ---- command line ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        with stdout_kept_clean(args.json):
            result = score(args.benchmark, args.predictions, args.annotations, args.against)
    except UserError as error:
        return tell(error)
    for problem in result["problems"]:
        print(f"warning: {problem}".encode("ascii", "backslashreplace").decode(), file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    else:
        print_rules(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
