"""What an evaluation is to run: benchmarks with their files and options, from a run's config or the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.schema import UserError
from eval.benchmarks import Benchmark, Row, find_benchmark
from eval.controls import Control
from mokamm.config import RunConfig
from mokamm.config_file import Loader
from mokamm.config_sections import BenchmarkConfig


@dataclass(frozen=True)
class Job:
    """One benchmark to run, with its files. name: what its results are called."""

    benchmark: Benchmark
    name: str
    path: Path
    media_dir: Path
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def load(self, control: Control) -> list[Row]:
        """The rows, with the samples that the model is asked under the control."""
        rows = self.benchmark.load(self.path, self.limit, self.options, self.media_dir)
        readable = [row for row in rows if row.sample is not None]
        asked = control.apply([row.sample for row in readable if row.sample])
        for row, sample in zip(readable, asked, strict=True):
            row.sample = sample
        return rows


def plan_jobs(config: RunConfig, args: argparse.Namespace) -> list[Job]:
    """The benchmarks asked for. Raises UserError for an unknown one, one without files, or files that are not there."""
    entries = _entries(config, args)
    for entry in entries:
        entry.options = {**entry.options, **read_options(args.option)}
    jobs = [job_of(config, entry, args.limit) for entry in entries]
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise UserError(
            f"the run's evaluation.benchmarks name one benchmark twice ({', '.join(names)}); their files would "
            "collide: give each entry a `name` of its own"
        )
    return jobs


def _entries(config: RunConfig, args: argparse.Namespace) -> list[BenchmarkConfig]:
    """Copies of the run's entries that are meant, by their own name or their benchmark's; or one of --path."""
    everything = args.benchmark == "all"
    if everything and (args.path or args.option):
        raise UserError(f"--{'path' if args.path else 'option'} belongs to one benchmark; name it instead of 'all'")
    known = [entry.model_copy(deep=True) for entry in config.evaluation.benchmarks]
    if not everything and args.benchmark not in [entry.name for entry in known]:
        args.benchmark = find_benchmark(args.benchmark).name
    if args.path:
        own = [entry for entry in known if entry.name == args.benchmark][:1]
        meant = own or [entry for entry in known if entry.benchmark == args.benchmark]
        # the options and limit of the one that is meant hold
        entry = meant[0] if len(meant) == 1 else BenchmarkConfig(benchmark=args.benchmark, path=args.path)
        entry.path = str(Path(args.path).absolute())
        entry.media_dir = args.media_dir or str(args.path if Path(args.path).is_dir() else Path(args.path).parent)
        return [entry]
    entries = [entry for entry in known if everything or args.benchmark in (entry.name, entry.benchmark)]
    if not entries:
        named = ", ".join(entry.called for entry in known) or "none"
        raise UserError(
            f"the run names no files for '{args.benchmark}' (its evaluation.benchmarks: {named}); "
            "add --path FILE and --media-dir FOLDER, or an entry {benchmark, path, media_dir} to RUN/config.yaml"
        )
    return entries


def job_of(config: RunConfig, entry: BenchmarkConfig, limit: int | None = None) -> Job:
    """The job of an entry of evaluation.benchmarks. Raises UserError as `plan_jobs`."""
    benchmark = find_benchmark(entry.benchmark)
    if problems := benchmark.option_problems(entry.options):
        raise UserError(f"benchmark {benchmark.name} " + "; ".join(problems))
    path, media_dir = config.locate(entry)
    if not path.exists():
        how = f"; {benchmark.home}" if benchmark.home else _how_to_make(config)
        raise UserError(f"benchmark {benchmark.name}: no such annotation file: {path}{how}")
    return Job(benchmark, entry.called, path, media_dir, limit or entry.limit, entry.options)


def _how_to_make(config: RunConfig) -> str:
    world = config.data.world
    if world is None:
        return ""
    command = f"python -m data.miniworld --out {world.dir} --split test --num {world.test} --seed {world.seed}"
    return f"; the run's miniature world is made by: {command}"


def read_options(words: list[str]) -> dict[str, Any]:
    """`circular=true` from the command line; values are read as YAML, as those of a configuration are."""
    options = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UserError(f"--option {word}: expected NAME=VALUE, such as circular=true")
        try:
            options[name] = yaml.load(text, Loader)
        except yaml.YAMLError:
            options[name] = text
    return options
