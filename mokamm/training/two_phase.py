"""LoRI-S without a mask: train the dense method first, cut the mask, throw that B away, train the sparse one from zero.

    RUN/lori_d/                 phase 1: a run of its own (config, metrics, checkpoints, final), by the same train()
    RUN/lori_mask.safetensors   cut from its final adapter
    RUN/                        phase 2: the run proper, with the same A, B = 0, and the projectors again from init_from

Both phases resume: a killed run finds phase 1 where it was, or done, and goes on. Phase 1 is passed over where the mask
says that it was cut from the very same phase; otherwise it is asked again, which costs building its model and trains only
what is missing. What phase 1 took stands in RUN/metrics.jsonl as its first line (kind "calibration"), so that a
comparison of methods counts it. The result is that of three commands: lori_d, `mokamm lori-mask`, lori_s with that mask.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mokamm.config import RunConfig, find_path
from mokamm.lori_mask import cut, made_from, read_mask, write_mask
from mokamm.names import DENSE
from mokamm.training import checkpoint
from mokamm.training.disk import writing
from mokamm.training.resume import adapter_settings, described
from mokamm.training.watch import METRICS, read_metrics
from mokamm.weights import fingerprint

if TYPE_CHECKING:
    from mokamm.training.launch import Ranks

FOLDER, MASK = "lori_d", "lori_mask.safetensors"
SPARSITY = 0.9


def needs_mask(config: RunConfig) -> bool:
    return config.training.stage == 2 and config.adapter.method in DENSE and config.adapter.mask is None


def calibrate(config: RunConfig, run: Path, ranks: Ranks, train: Callable[[RunConfig, Path, Ranks], None]) -> None:
    """Phase 1, as far as it is missing; then the config names its mask. On every rank."""
    from mokamm.training.launch import free_memory, seed_everything

    dense, path = phase_one(config), run / MASK
    folder, fresh = Path(dense.training.output_dir), config.training.resume_from_checkpoint is None
    origin, there = ranks.shared(lambda: (_origin(dense, config, ranks.world), made_from(path)))
    if fresh or there != origin:
        ranks.shared(lambda: _refuse_another(config, run))  # before its mask is cut anew
        if ranks.main:
            print(f"phase 1 of 2: {dense.adapter.method} in {folder}, from which the mask is cut", flush=True)
            with writing(folder, "choose another training.output_dir"):
                folder.mkdir(parents=True, exist_ok=True)
        ranks.barrier()
        train(dense, folder, ranks)
        config.model.llm.chat_date = dense.model.llm.chat_date  # one run, one day
        free_memory()  # of its model, before the second is built
        if ranks.main:
            with writing(path, "make room, then start the same command again: it goes on from here"):
                write_mask(cut(folder, config.adapter.sparsity or SPARSITY), path, origin)
        ranks.barrier()
        seed_everything(config.training.seed)  # as a launch of phase 2 alone would begin
    config.adapter.mask = str(path)
    if ranks.main:
        mask = read_mask(path)
        print(f"phase 2 of 2: {config.adapter.method}, {mask.kept:,} of {mask.total:,} entries of B train", flush=True)


def phase_one(config: RunConfig) -> RunConfig:
    """The dense run. B's rate is a tenth (LoRI's own ratio of rates) unless the config says otherwise; under `auto` it is
    what that gives for the dense method, which is not a tenth."""
    dense = config.model_copy(deep=True)
    adapter, training, share = dense.adapter, dense.training, config.adapter.calibration_share or 1.0
    training.output_dir = str(Path(training.output_dir) / FOLDER)
    rate = training.learning_rate
    if training.projector_learning_rate is None and not isinstance(rate, str):
        training.projector_learning_rate = rate
    training.learning_rate = adapter.calibration_learning_rate or (rate if isinstance(rate, str) else rate / 10)
    if training.max_steps > 0:
        training.max_steps = max(1, round(share * training.max_steps))
    training.num_train_epochs *= share
    if training.resume_from_checkpoint is not None:
        training.resume_from_checkpoint = "auto"
    adapter.method = DENSE[adapter.method]
    adapter.init_a_only = True if adapter.init_from or training.init_from else None  # a mask is of the new task alone
    adapter.sparsity = adapter.calibration_share = adapter.calibration_learning_rate = None
    dense.evaluation.benchmarks = []
    dense.versions = {}
    return dense


def _refuse_another(config: RunConfig, run: Path) -> None:
    """UserError where phase 2 has begun with other adapter settings, of which phase 1 may know nothing (sparsity)."""
    if begun := checkpoint.find(run, config.training.resume_from_checkpoint):
        checkpoint.read_state(begun, {"adapter": adapter_settings(config)})


def _origin(dense: RunConfig, config: RunConfig, world: int) -> str:
    """What a mask was cut from: phase 1's settings, rows and base by their content, wherever they lie; and the sparsity."""
    settings, base = dense.to_dict(), find_path(dense.model.llm.path)
    del settings["training"]["output_dir"]
    rows = [described(dense, entry) for entry in (*dense.data.train, *dense.data.validation)]
    weights = fingerprint(base) if base.is_dir() else None
    text = json.dumps([settings, rows, weights, world, config.adapter.sparsity or SPARSITY], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def record(config: RunConfig, run: Path) -> None:
    """Put phase 1's account, if there was one, at the head of RUN/metrics.jsonl before the first step; on one rank."""
    if config.adapter.mask != str(run / MASK):
        return
    found = read_metrics(run / FOLDER / METRICS)
    train = [entry for entry in found if entry["kind"] == "train"]
    if train and not (run / METRICS).exists():
        line: dict[str, Any] = {"kind": "calibration", "step": 0, "epoch": 0.0, "steps": train[-1]["step"]}
        line |= {"seconds": round(sum(entry["seconds"] for entry in train), 3), "loss": train[-1]["loss"]}
        (run / METRICS).write_text(json.dumps({**line, "run": FOLDER}) + "\n")
