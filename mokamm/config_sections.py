"""The sections of a configuration: what each key is called, what it may hold, and what it is where nobody says.

A section checks what it can know by itself; what several sections must agree on, `RunConfig` does (mokamm/config.py).
Parts (encoders, projectors) take options of their own, which the part checks when it is built. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import date
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from data.schema import nearest
from data.sources import SOURCES, option_takers
from encoders import ENCODERS
from encoders.options import option_problems
from mokamm import names

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Strategy = Literal["no", "steps", "epoch"]


def _one_of(known: Collection[str], what: str) -> AfterValidator:
    """A name of a registry; the message of an unknown one holds the nearest known one."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown {what} '{name}'{nearest(name, known)}")
        return name

    return AfterValidator(check)


def _regex(what: str) -> AfterValidator:
    """A regex, or a list of names as it is. what: the message's word for a text that is none."""

    def check(value: Any) -> Any:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"'{value}' is {what}: {error}") from None
        return value

    return AfterValidator(check)


Pattern = Annotated[str, _regex("not a regex")]
# all-linear, a regex of whole names, or last names
Modules = Annotated[str | list[str], _regex("neither 'all-linear' nor a regex")]


class Section(BaseModel):
    """A mapping of the configuration; a key that it does not know is a mistake.

    newer: keys that are left out of a dump while they are not set, so that digests of configurations stay what they were
    before there were such keys.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    newer: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_before(self, dump: Any) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value or key not in self.newer}


class Part(BaseModel):
    """A registered part: its name, and options that are checked by the part itself when it is built."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EncoderConfig(Part):
    name: Annotated[str, _one_of(ENCODERS, "encoder")]
    path: str


class ProjectorConfig(Part):
    name: Annotated[str, _one_of(names.PROJECTORS, "projector")] = "qformer"


class LLMConfig(Section):
    newer = frozenset({"chat_date", "thinking"})
    path: str  # hub id or local folder
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    quantization: Literal["4bit", "8bit"] | None = None  # of the frozen weights, by bitsandbytes; it computes in dtype
    chat_template: Literal["plain"] | None = None  # where the tokenizer has none: USER: ... ASSISTANT: ...
    chat_date: date | None = None  # for templates that print the day; None: a run's first day, without a run today
    thinking: bool = False  # learn and give thoughts (<think>) before an answer, where the template knows of such
    trust_remote_code: bool = False


class ModalityConfig(Section):
    """segments: frames of a video or windows of a sound; seconds: length of a window (None: the encoder's own)."""

    encoder: EncoderConfig
    projector: ProjectorConfig = ProjectorConfig()
    segments: Positive = 1
    seconds: PositiveFloat | None = None
    boundaries: bool = True


class ModelConfig(Section):
    llm: LLMConfig
    modalities: dict[str, ModalityConfig] = {}

    @field_validator("modalities")
    @classmethod
    def _names(cls, modalities: dict[str, ModalityConfig]) -> dict[str, ModalityConfig]:
        for name in modalities:
            if name == "text":
                raise ValueError("'text' is always the first modality and has no encoder; leave it out")
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(f"'{name}' is no name for a modality: lower case letters, digits and _ only")
        return modalities

    @property
    def modality_names(self) -> list[str]:
        """All modalities, in the order of the adapter's matrices and of `modality_ids`."""
        return ["text", *self.modalities]


class CotoConfig(Section):
    """Every block's adapters act with probability p in a step: p rises from p0 to 1 within `share` of all steps."""

    p0: BelowOne = 0.0
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75


class StochasticDepthConfig(Section):
    """The same with one p for all steps; the default is CoTo's mean."""

    p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.625


class AdapterConfig(Section):
    """One section for all methods; None: the method's own default. coto, stochastic_depth: options, or true, or false."""

    method: Annotated[str, _one_of(names.METHODS, "adapter method")] = "moka"
    r: Positive = 4
    lora_alpha: PositiveFloat = 16
    lora_dropout: BelowOne = 0.0
    target_modules: Modules = "all-linear"
    exclude_modules: Modules | None = None
    target_parameters: list[Pattern] | None = None  # fused expert weights, such as experts.down_proj; method lora
    attention_weight: float = 1.0
    attention_weight_pattern: dict[Pattern, float] = {}
    scale_logits: bool = True
    logits_by_keys: bool | None = None  # of checkpoints of MokA's own code until 2025-12-28
    shared_b: bool | None = None
    frozen_a: bool | None = None
    one_matmul: bool | None = None  # of hira; false: PEFT's own forward
    # LoRI: lori_d, lori_s, lori_moka_d, lori_moka_s
    a_seed: int | None = None  # of the frozen A; None: training.seed
    store_a: bool | None = None  # write A into the adapter's file, instead of remaking it from its seed
    sparsity: Share | None = None  # of B that stays zero; None: 0.9, or the mask's
    mask: str | None = None  # file of `mokamm lori-mask`; None: a sparse method trains its dense one first and cuts it
    calibration_share: PositiveFloat | None = None  # steps of that first phase to the second's; None: 1
    calibration_learning_rate: PositiveFloat | None = None  # None: a tenth of training.learning_rate
    init_from: str | None = None  # a run or adapter of LoRI to go on from; entries outside a mask stay as they are
    init_a_only: bool | None = None  # of init_from take A alone; B begins at zero
    keys: Literal["question", "user"] = "question"
    coto: CotoConfig | None = None
    stochastic_depth: StochasticDepthConfig | None = None

    @field_validator("coto", "stochastic_depth", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @model_validator(mode="after")
    def _can_sit_out(self) -> AdapterConfig:
        asked = [name for name in ("coto", "stochastic_depth") if getattr(self, name) is not None]
        if len(asked) == 2:
            raise ValueError("coto and stochastic_depth are both set; keep one of them")
        if asked and self.method in names.WITHOUT_ADAPTERS:
            known = ", ".join(name for name in names.METHODS if name not in names.WITHOUT_ADAPTERS)
            raise ValueError(
                f"{asked[0]} lets adapters sit out, and method '{self.method}' has none; choose one of {known}, or "
                f"leave {asked[0]} out"
            )
        return self

    @model_validator(mode="after")
    def _has_a_use_for_its_files(self) -> AdapterConfig:
        """Settings of other methods are let pass, so that one override switches methods; a file is meant to be read."""
        for key, methods in (("mask", tuple(names.DENSE)), ("init_from", names.LORI)):
            if getattr(self, key) is not None and self.method not in methods:
                raise ValueError(
                    f"{key} is a file of {', '.join(methods)}, and method '{self.method}' would not read it: choose one of "
                    f"them, or leave it out (adapter.{key}=null)"
                )
        return self


def _options_only(options: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    if own := [name for name in options if name in section.model_fields]:
        raise ValueError(f"'{own[0]}' is a key beside `options`, not one of them")
    return options


class SourceConfig(Section):
    """One annotation file. path and media_dir: see `locate`. limit: the first rows only; weight 0.5: half of the rows
    in an epoch of training, the others in the next; 2: all of them twice."""

    source: Annotated[str, _one_of(SOURCES, "data source")]
    path: str
    name: str | None = None
    media_dir: str | None = None
    weight: PositiveFloat = 1.0
    limit: Positive | None = None
    options: dict[str, Any] = {}

    @field_validator("options")
    @classmethod
    def _known_to_the_reader(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        _options_only(options, cls)
        source = info.data.get("source")  # not there where it is unknown itself
        if source and (problems := option_problems(options, *option_takers(source))):
            raise ValueError(f"data source '{source}' " + "; ".join(problems))
        return options


class WorldConfig(Section):
    """The miniature world, generated where DIR/SPLIT is not there yet. train, validation, test: numbers of scenes."""

    dir: str
    seed: int = 0
    train: Positive
    validation: Positive
    test: Positive


class CacheConfig(Section):
    dir: str
    max_gb: PositiveFloat = 10.0


class LimitsConfig(Section):
    """What a media file may hold, checked from its header before it is decoded."""

    max_pixels: Positive = 50_000_000  # of an image or a frame
    max_seconds: PositiveFloat = 3600.0
    max_bytes: Positive = 2_000_000_000


class DataConfig(Section):
    media_dir: str | None = None
    world: WorldConfig | None = None
    train: list[SourceConfig] = Field(min_length=1)
    validation: list[SourceConfig] = []
    max_length: Positive = 1024
    cache: CacheConfig | None = None
    max_bad_fraction: Fraction | None = None  # None: 0.05, but a few bad rows stop no run, however small its data
    allow_outside: bool = False  # let annotations name media outside media_dir
    limits: LimitsConfig = LimitsConfig()


class SettledConfig(Section):
    """Keys of transformers.TrainingArguments that have one meaning here: they may stand in a file, and change nothing."""

    optim: Literal["adamw_torch", "adamw_torch_fused"] = Field("adamw_torch", exclude=True)
    fp16: Literal[False] = Field(False, exclude=True)
    logging_strategy: Literal["steps"] = Field("steps", exclude=True)
    average_tokens_across_devices: Literal[True] = Field(True, exclude=True)
    gradient_checkpointing_kwargs: dict[Literal["use_reentrant"], Literal[False]] = Field({}, exclude=True)
    ddp_find_unused_parameters: Literal[False] = Field(False, exclude=True)
    remove_unused_columns: Literal[False] = Field(False, exclude=True)
    save_safetensors: Literal[True] = Field(True, exclude=True)
    save_only_model: Literal[False] = Field(False, exclude=True)
    greater_is_better: bool | None = Field(None, exclude=True)  # must be what the metric is


class TrainingConfig(SettledConfig):
    """Named as in transformers.TrainingArguments.

    eval_steps, save_steps: None = at the end of every epoch; below 1 = a share of all steps. eval_strategy,
    save_strategy: None = what those say; `no` = never, but for the save at the end. A better validation saves anyway.
    """

    newer = frozenset({"lr_scheduler_kwargs", "logging_first_step", "eval_strategy", "save_strategy"})
    output_dir: str
    stage: Literal[1, 2] = 2  # 1: projectors only; 2: projectors and adapter (or the whole LLM)
    init_from: str | list[str] | None = None  # runs, checkpoints or folders with projectors.safetensors
    learning_rate: PositiveFloat | Literal["auto"] = 1.0e-4  # auto: by mokamm/training/rate.py
    projector_learning_rate: NonNegativeFloat | None = None  # None: learning_rate; 0: projectors stay as they are
    num_train_epochs: PositiveFloat = 3.0
    max_steps: int = -1
    per_device_train_batch_size: Positive = 4
    per_device_eval_batch_size: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    lr_scheduler_type: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "cosine_with_min_lr",
        "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay",
    ] = "cosine"  # fmt: skip
    lr_scheduler_kwargs: dict[str, Any] | None = None  # transformers' for that type: num_cycles, min_lr, power, ...
    warmup_ratio: Fraction = 0.0
    warmup_steps: NonNegativeFloat = 0  # below 1: a share of all steps, as in newer transformers
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.999
    adam_epsilon: NonNegativeFloat = 1.0e-8
    max_grad_norm: NonNegativeFloat = 1.0  # 0: no clipping
    on_nan: Literal["stop", "skip"] = "stop"  # at a loss or gradient that is not finite; its update is never made
    loss_spike: Annotated[float, Field(gt=1.0)] | None = None  # as on_nan, at so many times the mean loss of 50 steps
    bf16: bool = False
    gradient_checkpointing: bool = False
    group_by_length: bool = False  # rows of like length together; or train_sampling_strategy, its newer name
    packing: bool = False  # samples of a batch share rows, each kept to itself; see mokamm/training/packing.py
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 2
    logging_steps: Positive | Share = 10
    logging_first_step: bool = False
    eval_strategy: Strategy | None = None
    eval_steps: Positive | Share | None = None
    save_strategy: Strategy | Literal["best"] | None = None
    save_steps: Positive | Share | None = None
    save_total_limit: Positive | None = 3
    load_best_model_at_end: bool = True
    metric_for_best_model: Literal["loss", "accuracy"] = "accuracy"
    resume_from_checkpoint: str | None = "auto"
    report_to: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    deepspeed: str | None = None  # path of a DeepSpeed JSON; None: plain PyTorch
    ddp_timeout: Positive = 1800  # seconds that a rank waits for the others; a save by rank 0 must fit into it
    use_cpu: bool | None = None  # None: where there is no GPU
    seed: int = 0

    @field_validator("metric_for_best_model", mode="before")
    @classmethod
    def _of_validation(cls, value: Any) -> Any:
        """transformers says eval_loss too."""
        return value.removeprefix("eval_") if isinstance(value, str) else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _report_to(cls, value: Any) -> Any:
        if value in (None, "none", ["none"]):
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _strategy(cls, value: Any) -> Any:
        """A bare `no` is false in YAML."""
        return "no" if value is False else value

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def _resume(cls, value: Any) -> Any:
        """transformers says true for the last one of the folder."""
        return "auto" if value is True else None if value is False else value

    @model_validator(mode="before")
    @classmethod
    def _newer_names(cls, values: Any) -> Any:
        """transformers 5 says train_sampling_strategy: group_by_length; older ones said evaluation_strategy."""
        if isinstance(values, dict) and "evaluation_strategy" in values and "eval_strategy" not in values:
            values = {"eval_strategy" if key == "evaluation_strategy" else key: v for key, v in values.items()}
        if not isinstance(values, dict) or "train_sampling_strategy" not in values:
            return values
        rest = {key: value for key, value in values.items() if key != "train_sampling_strategy"}
        strategy = values["train_sampling_strategy"]
        if strategy not in ("random", "group_by_length"):
            raise ValueError(f"train_sampling_strategy is {strategy!r}; expected 'random' or 'group_by_length'")
        if "group_by_length" in rest:
            raise ValueError("group_by_length and train_sampling_strategy are both set; keep one of them")
        return {**rest, "group_by_length": strategy == "group_by_length"}

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}; expected a positive number, or -1 for num_train_epochs")
        if self.greater_is_better not in (None, self.metric_for_best_model == "accuracy"):
            raise ValueError(
                f"greater_is_better is {self.greater_is_better}, while metric_for_best_model is "
                f"{self.metric_for_best_model}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _in_steps(self) -> TrainingConfig:
        """eval_steps and save_steps as their strategies have them, with transformers' own steps where none are given."""
        if self.eval_strategy in ("steps", "epoch"):
            self.eval_steps = (self.eval_steps or self.logging_steps) if self.eval_strategy == "steps" else None
        if self.save_strategy in ("steps", "epoch"):
            self.save_steps = (self.save_steps or 500) if self.save_strategy == "steps" else None
        return self

    @property
    def init_folders(self) -> list[str]:
        return [self.init_from] if isinstance(self.init_from, str) else self.init_from or []

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size or self.per_device_train_batch_size


class BenchmarkConfig(Section):
    """One annotation file of a benchmark. name: what its results are called, if not as the benchmark; options: checked
    by the benchmark when it is run."""

    benchmark: Annotated[str, _one_of(names.BENCHMARKS, "benchmark")]
    path: str
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    media_dir: str | None = None
    limit: Positive | None = None
    options: dict[str, Any] = {}

    @property
    def called(self) -> str:
        return self.name or self.benchmark

    @field_validator("options")
    @classmethod
    def _no_keys_of_its_own(cls, options: dict[str, Any]) -> dict[str, Any]:
        return _options_only(options, cls)


class EvaluationConfig(Section):
    benchmarks: list[BenchmarkConfig] = []
    batch_size: Positive = 16
    max_new_tokens: Positive = 32
