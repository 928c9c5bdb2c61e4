"""What is to be compared: a YAML file, checked as a whole before the first run.

    extends: common.yaml               another such file, over which this one is laid (mokamm/config_file.py)
    base: configs/mini/av_text.yaml    the run that every method starts from
    output_dir: runs/compare/av        RUNS and the report go here (--out overrides)
    overrides: {training.max_steps: 150}          dotted keys, for all methods alike
    rates: [3.0e-4, 1.0e-3, 3.0e-3]    rates of methods that name none of their own, in rising order
    extend: 1                          so many rates more where the best one lies at an end of its grid
    seeds: [0, 1, 2]                   the chosen rate is run with each of them
    rate_seeds: 1                      all rates are run with so many of them, and chosen by their mean
    choose_by: loss                    of the validation split; or accuracy
    reference: lora                    the method that the others are tested against
    methods:
      moka: {overrides: {adapter.method: moka, adapter.r: 4}}             a method may override `adapter.*` only
      full: {overrides: {adapter.method: full}, rates: [...]}             group: name, to be joined by a line in a plot

So all runs share data, steps, batch size and whatever else `base` and `overrides` say. A run is told by the overrides
that it lays over `base`: `python mokamm/train.py BASE OVERRIDES` is the same run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from data.schema import listed, nearest
from eval.benchmarks import BENCHMARKS
from mokamm.config import RunConfig, find_path, load_config
from mokamm.config_file import ConfigError, explain, read_yaml
from mokamm.config_sections import Positive, Section

Rate = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # names a folder
OWN = ("training.output_dir", "training.learning_rate", "training.seed")  # set for each run by the comparison


def _rising(rates: list[float] | None) -> list[float] | None:
    if rates is not None and any(low >= high for low, high in itertools.pairwise(rates)):
        raise ValueError(f"rates must rise, each once; found {rates}")
    return rates


class MethodConfig(Section):
    _name: str = PrivateAttr("")  # its key
    overrides: dict[str, Any] = Field({})
    rates: Annotated[list[Rate], Field(min_length=1)] | None = None
    group: str | None = None

    _rates = field_validator("rates")(_rising)

    @property
    def name(self) -> str:
        return self._name

    @field_validator("overrides")
    @classmethod
    def _of_the_adapter(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        for key in overrides:
            if not key.startswith("adapter."):
                raise ValueError(
                    f"a method may override keys below 'adapter.' only, so that all else is equal; found {key}"
                )
        return overrides


class CompareConfig(Section):
    base: str
    output_dir: str
    overrides: dict[str, Any] = Field({})
    rates: list[Rate] = Field([3e-4, 1e-3, 3e-3, 1e-2, 3e-2], min_length=1)
    extend: Annotated[int, Field(ge=0)] = 1
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    rate_seeds: Positive = 1
    choose_by: Literal["loss", "accuracy"] = "loss"
    reference: str = "lora"
    methods: Annotated[dict[Name, MethodConfig], Field(min_length=1)]

    _rates = field_validator("rates")(_rising)

    @field_validator("overrides")
    @classmethod
    def _not_its_own(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        for key in overrides:
            if key in OWN:
                raise ValueError(f"{key} is set by the comparison itself (rates, seeds, output_dir); leave it out")
        return overrides

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"each seed may stand there once; found {seeds}")
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        for name, method in self.methods.items():
            method._name = name
        if self.reference not in self.methods:
            raise ValueError(f"reference: there is no method '{self.reference}'{nearest(self.reference, self.methods)}")
        if self.rate_seeds > len(self.seeds):
            raise ValueError(f"rate_seeds is {self.rate_seeds}, but there are {len(self.seeds)} seeds")
        return self

    def grid(self, method: MethodConfig) -> list[float]:
        return list(method.rates or self.rates)


@dataclass(frozen=True, order=True)
class Run:
    """One training of the plan."""

    method: str
    rate: float
    seed: int

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.method / f"rate-{self.rate:g}-seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.method}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A checked configuration and the folder of its runs."""

    config: CompareConfig
    out: Path

    @property
    def base(self) -> Path:
        return find_path(self.config.base)

    def overrides(self, run: Run) -> list[str]:
        """What the run lays over `base`, as on the command line of mokamm/train.py."""
        own = dict(zip(OWN, (run.folder(self.out).as_posix(), run.rate, run.seed), strict=True))
        return written({**self.config.overrides, **self.config.methods[run.method].overrides, **own})

    def run_config(self, run: Run) -> RunConfig:
        return load_config(self.base, self.overrides(run))

    @cached_property
    def benchmarks(self) -> dict[str, str]:
        """Those that every run is scored by: what their results are called, and which benchmark it is."""
        return {entry.called: entry.benchmark for entry in self.run_config(self.any_run()).evaluation.benchmarks}

    def any_run(self) -> Run:
        method = next(iter(self.config.methods.values()))
        return Run(method.name, self.config.grid(method)[0], self.config.seeds[0])


def written(overrides: Mapping[str, Any]) -> list[str]:
    """{"a.b": 1e-5} -> ["a.b=1.0e-05"]: YAML on one line."""
    return [f"{key}={_flow(value)}" for key, value in overrides.items()]


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


# ---- reading and checking --------------------------------------------------------------------------------------------


def load_comparison(path: str | Path, out: str | Path | None = None, only: list[str] | None = None) -> Comparison:
    """Read and check a comparison and the run of each of its methods. Raises ConfigError with every mistake found.

    only: names of methods to be compared, instead of all.
    """
    path = Path(path)
    tree, lines = read_yaml(path)
    try:
        config = CompareConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(listed(f"{path} cannot be used:", explain(CompareConfig, error, tree, lines))) from None
    config.methods = _chosen(config, only)
    comparison = Comparison(config, Path(out or config.output_dir))
    problems = _run_problems(comparison)
    if problems:
        raise ConfigError(listed(f"{path} cannot be used:", problems))
    return comparison


def _chosen(config: CompareConfig, only: list[str] | None) -> dict[str, MethodConfig]:
    if only is None:
        return config.methods
    for name in only:
        if name not in config.methods:
            raise ConfigError(f"--methods: there is no method '{name}'{nearest(name, config.methods)}")
    if config.reference not in only:
        raise ConfigError(f"--methods: the reference '{config.reference}' must be among them")
    return {name: method for name, method in config.methods.items() if name in only}


def _run_problems(comparison: Comparison) -> list[str]:
    """What is wrong with the runs; what all methods share is told once."""
    config = comparison.config
    try:
        plain = load_config(comparison.base, written(config.overrides))
        plain.check_files()
    except ConfigError as error:
        return _each(error, "base with overrides")
    problems = _unfit(plain)
    for method in config.methods.values():
        try:
            comparison.run_config(Run(method.name, config.grid(method)[0], config.seeds[0]))
        except ConfigError as error:
            problems += _each(error, f"method {method.name}")
    return problems


def _each(error: ConfigError, whose: str) -> list[str]:
    """The mistakes that a message lists, each with whose it is."""
    title, *mistakes = str(error).split("\n  - ")
    return [f"{whose}: {mistake}" for mistake in mistakes or [title]]


def _unfit(plain: RunConfig) -> list[str]:
    """What a run must have to be compared."""
    training, problems = plain.training, []
    if training.deepspeed:
        problems.append(
            f"training.deepspeed is {training.deepspeed}: runs are compared in plain PyTorch, a process each; add "
            "training.deepspeed: null to overrides"
        )
    if training.stage != 2:
        problems.append(f"training.stage is {training.stage}: only stage 2 has a method; expected 2")
    if training.resume_from_checkpoint != "auto":
        problems.append("training.resume_from_checkpoint must be auto: a stopped comparison goes on from there")
    if not plain.data.validation:
        problems.append("data.validation is empty: rates are chosen by it")
    named = [entry.called for entry in plain.evaluation.benchmarks]
    if not named:
        problems.append("evaluation.benchmarks is empty: methods are compared by them")
    for entry in plain.evaluation.benchmarks:
        benchmark = BENCHMARKS[entry.benchmark]
        wrong = benchmark.option_problems(entry.options)
        problems += [f"evaluation.benchmarks: {entry.called} {told}" for told in wrong]
        if benchmark.scale != "share":
            problems.append(
                f"evaluation.benchmarks: the score of {entry.called} is no share of its rows, by which methods are "
                "compared; leave it out, and compare runs with eval/score.py --against"
            )
    if len(set(named)) < len(named):
        problems.append(f"evaluation.benchmarks name one benchmark twice: {', '.join(named)}")
    return problems
