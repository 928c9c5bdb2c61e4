"""Where a run begins: at step 0, or at a checkpoint of the same run; and what makes it the same run.

begin --find--> checkpoint | None --compare `common`--> TrainerState, or a refusal that names the differences
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import IO, Any

from data.sources import annotation_files
from mokamm.config import RunConfig, find_path
from mokamm.config_sections import SourceConfig
from mokamm.lori_mask import read_mask
from mokamm.training import checkpoint
from mokamm.training.checkpoint import TrainerState
from mokamm.training.corpus import Corpus
from mokamm.training.disk import hold
from mokamm.training.launch import Ranks
from mokamm.training.stream import Plan, plan_of
from mokamm.weights import fingerprint, sha256


@dataclass
class Beginning:
    """Where a run begins: its steps, how far they are done, and the checkpoint that holds them (None: at step 0)."""

    plan: Plan
    state: TrainerState
    folder: Path | None
    lock: IO[str] | None  # held by rank 0 as long as this lives


def begin(config: RunConfig, corpus: Corpus, ranks: Ranks) -> Beginning:
    """Find what to go on from, and move aside what another run left in the folder; on every rank, before any writing.

    Sets the configuration's chat_date: to that of the run's first step, where it names none.

    Raises UserError where the checkpoint comes from another run than the one configured.
    """
    training, run = config.training, Path(config.training.output_dir)
    plan = plan_of(training, len(corpus.train), ranks.world)
    lock = hold(run) if ranks.main else None
    if ranks.main:
        checkpoint.sweep(run)
    folder = ranks.shared(lambda: checkpoint.find(run, training.resume_from_checkpoint))
    same = {**ranks.shared(lambda: common(config, plan)), "device": ranks.device.type}
    state = checkpoint.read_state(folder, same) if folder else TrainerState(same=same)
    today = ranks.shared(lambda: date.today().isoformat())
    config.model.llm.chat_date = date.fromisoformat(state.same.setdefault(DAY, same.get(DAY, today)))
    own = folder is not None and folder.resolve().parent == run.resolve()
    if not own:
        state.best = None  # its checkpoint is not in this folder, where the result is taken from
    if training.load_best_model_at_end and ranks.shared(lambda: checkpoint.best_is_lost(run, state)):
        state.best = None
    if ranks.main:
        checkpoint.set_aside(run, state.step if own else 0)
    ranks.barrier()
    return Beginning(plan, state, folder, lock)


DAY = "model.llm.chat_date"
SAME = (
    "stage", "init_from", "learning_rate", "projector_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_ratio", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16",
    "group_by_length", "packing", "metric_for_best_model", "seed",
)  # fmt: skip


def common(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What a resumed run must share with the one it goes on from, for its steps to be the same.

    The base goes by its weights and annotation files by their content, wherever they lie; the DeepSpeed JSON by name and
    content. What is not named here leaves the steps as they are (how often to log, validate and save, workers, caches,
    reports), or is what one changes after a bad step: on_nan and loss_spike. Cost: reads the annotation files whole, so
    one rank asks for all.
    """
    training, llm = config.training, config.model.llm
    base = find_path(llm.path)
    deepspeed = find_path(training.deepspeed) if training.deepspeed else None
    return {
        "rows": plan.rows,
        "ranks": plan.world,
        "training.per_device_train_batch_size": plan.batch,
        "training.gradient_accumulation_steps": plan.accumulation,
        "total steps": plan.total_steps,
        **{f"training.{key}": getattr(training, key) for key in SAME},
        "training.deepspeed": deepspeed.name if deepspeed else None,
        "the DeepSpeed JSON": json.loads(deepspeed.read_text()) if deepspeed else None,
        "model.llm": llm.model_dump(mode="json", exclude={"path", "trust_remote_code", "chat_date"}),
        **({DAY: llm.chat_date.isoformat()} if llm.chat_date else {}),
        "the base's weights": fingerprint(base) if base.is_dir() else llm.path,
        "adapter": adapter_settings(config),
        "adapter.mask": read_mask(find_path(config.adapter.mask)).digest() if config.adapter.mask else None,
        # pairs, because the order of the modalities counts
        "model.modalities": [[name, entry.model_dump(mode="json")] for name, entry in config.model.modalities.items()],
        "data.max_length": config.data.max_length,
        "data.limits": config.data.limits.model_dump(mode="json"),
        "data.allow_outside": config.data.allow_outside,
        "data.train": [described(config, entry) for entry in config.data.train],
        "data.validation": [described(config, entry) for entry in config.data.validation],
    }


def adapter_settings(config: RunConfig) -> dict[str, Any]:
    return config.adapter.model_dump(mode="json", exclude_none=True, exclude={"mask"})


def described(config: RunConfig, entry: SourceConfig) -> dict[str, Any]:
    """A source by the content of its annotation file, wherever it lies, and by its options."""
    path, _ = config.locate(entry)
    content = [sha256(file) for file in annotation_files(entry.source, path)]
    return {**entry.model_dump(mode="json", exclude={"media_dir"}), "path": _digest(content) if content else entry.path}


def _digest(content: list[str]) -> str:
    """One file's sha256, or that of the list of several."""
    return f"sha256 {content[0] if len(content) == 1 else hashlib.sha256(' '.join(content).encode()).hexdigest()}"
