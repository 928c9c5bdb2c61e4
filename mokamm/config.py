"""The configuration of a run: a YAML file plus `dotted.key=value` overrides, checked as a whole before anything heavy
is imported.

How it works: PyYAML reads the file (lines of all keys are kept for messages), overrides are laid over it, pydantic
checks it by its sections (config_sections.py), and every mistake is reported in one `ConfigError`, each with its dotted
key, its line and, for an unknown key, the nearest known one. A configuration is data: parts are named by short names of
registries, never by Python paths. Relative paths are relative to the folder from which the command is run. Cost: well
below a second; this module imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from data.schema import UserError, listed, near
from data.sources import SOURCES, is_there
from mokamm import names
from mokamm.config_file import ConfigError, apply_overrides, explain, nearest_file, read_yaml
from mokamm.config_sections import (
    AdapterConfig,
    BenchmarkConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Section,
    SourceConfig,
    TrainingConfig,
)

__all__ = ["ConfigError", "RunConfig", "find_path", "load_config", "load_run_config"]

ROOT = Path(__file__).resolve().parents[1]


class RunConfig(Section):
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    versions: dict[str, Any] = Field(default={})  # written into a run's config.yaml: libraries, and what the base was

    @field_validator("adapter", "evaluation", mode="before")
    @classmethod
    def _section(cls, value: Any) -> Any:
        """A section with nothing in it is what it is where nobody names it."""
        return {} if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.training.deepspeed and not self.training.bf16 and self.model.llm.dtype != "float32":
            raise ValueError(
                f"model.llm.dtype is {self.model.llm.dtype} while training.bf16 is false: DeepSpeed trains all "
                "parameters in one precision; set training.bf16=true, or model.llm.dtype=float32"
            )
        if self.model.llm.quantization and self.method in names.NEEDS_WHOLE_WEIGHTS:
            raise ValueError(
                f"model.llm.quantization is {self.model.llm.quantization}, and method '{self.method}' "
                f"{names.NEEDS_WHOLE_WEIGHTS[self.method]}: leave quantization out, or choose moka, multi_lora or lora"
            )
        if self.training.learning_rate == "auto" and self.method == "none":
            raise ValueError(
                "training.learning_rate is 'auto', which is the rate of the LLM's adapter, and nothing of the LLM is "
                "trained here: write a number (the paper's projectors: 1e-4)"
            )
        return self

    @property
    def method(self) -> str:
        """The adapter method that the run trains with: none in stage 1."""
        return "none" if self.training.stage == 1 else self.adapter.method

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def dump(self, path: str | Path) -> None:
        """Write the resolved configuration as YAML; `load_config` reads it back."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120))

    def locate(self, entry: SourceConfig | BenchmarkConfig) -> tuple[Path, Path]:
        """Where an entry's annotation file and its media folder are.

        media_dir: the entry's own, else data.media_dir, else the annotation file's folder. A relative path is looked
        for in the media folder first, then from the working directory.
        """
        path = Path(entry.path)
        media_dir = entry.media_dir or self.data.media_dir
        if media_dir is None:
            return path, path.parent
        inside = Path(media_dir) / path
        as_given = (
            path.exists()
            or path.is_relative_to(media_dir)  # the folder itself, or a file named with it
            or (isinstance(entry, SourceConfig) and SOURCES[entry.source].hub)
        )
        return (inside if inside.exists() or not as_given else path), Path(media_dir)

    def makes(self, path: Path) -> bool:
        """Whether the run makes that file itself, with its miniature world."""
        world = self.data.world
        return world is not None and Path(world.dir).resolve() in path.resolve().parents

    def check_files(self, world_is_made: bool = False) -> None:
        """Raise ConfigError naming every local file that the configuration promises and that is not there.

        Files below `data.world.dir` are made by the run itself and are asked for only once they are."""
        problems = []
        named: tuple[tuple[str, list[Any]], ...] = (
            ("data.train", self.data.train),
            ("data.validation", self.data.validation),
            ("evaluation.benchmarks", self.evaluation.benchmarks),
        )
        for key, entries in named:
            for i, entry in enumerate(entries):
                path, _ = self.locate(entry)
                if not is_found(entry, path) and (world_is_made or not self.makes(path)):
                    problems.append(f"{key}.{i}.path: no such file: {path}{near(path)}")
        if self.training.deepspeed:
            problems += _json_problems("training.deepspeed", find_path(self.training.deepspeed))
        problems += [
            f"training.init_from: no such folder: {f}" for f in self.training.init_folders if not find_path(f).is_dir()
        ]
        if self.adapter.mask and not find_path(self.adapter.mask).is_file():
            problems.append(f"adapter.mask: no such file: {self.adapter.mask}")
        if self.adapter.init_from and not find_path(self.adapter.init_from).is_dir():
            problems.append(f"adapter.init_from: no such folder: {self.adapter.init_from}")
        if problems:
            heading = (
                f"the configuration names files that are not there, or not readable (working directory {Path.cwd()}):"
            )
            raise ConfigError(listed(heading, problems))


def is_found(entry: SourceConfig | BenchmarkConfig, path: Path) -> bool:
    """Whether an entry's annotation file is there; a benchmark, which may be a folder, says itself what it wants in it."""
    return is_there(entry.source, path) if isinstance(entry, SourceConfig) else path.exists()


def find_path(path: str) -> Path:
    """A local path from the working directory, else from this checkout (where the shipped base and configs are)."""
    return ROOT / path if not Path(path).exists() and (ROOT / path).exists() else Path(path)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read, override and check a configuration. Raises ConfigError with every mistake found."""
    path = Path(path)
    tree, lines = read_yaml(path)
    problems = apply_overrides(tree, lines, overrides or [])
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems += explain(RunConfig, error, tree, lines)
    if problems:
        raise ConfigError(listed(f"{path} cannot be used:", problems))
    return config


def load_run_config(run: str | Path) -> RunConfig:
    """The configuration of a finished run. Raises UserError for a folder that is none."""
    run = Path(run)
    for part in ("config.yaml", "final"):
        if not (run / part).exists():
            raise UserError(
                f"{run} is no finished run: {run / part} is not there (working directory {Path.cwd()}); "
                "expected the output_dir of a training (python mokamm/train.py CONFIG makes one)"
            )
    return load_config(run / "config.yaml")


def _json_problems(key: str, path: Path) -> list[str]:
    if not path.is_file():
        return [f"{key}: no such file: {path}{nearest_file(path, '*.json')}"]
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        return [f"{key}: {path} is not JSON: {error}"]
    if not isinstance(content, dict):
        return [f"{key}: {path} must hold a JSON object"]
    zero = content.get("zero_optimization") or {}
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage in (0, 1, 2, 3) and not isinstance(stage, bool):
        return []
    return [f"{key}: {path}: zero_optimization.stage must be 0, 1, 2 or 3; found {json.dumps(stage)}"]
