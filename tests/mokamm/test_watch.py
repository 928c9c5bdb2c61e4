"""Where records go: metrics.jsonl always, TensorBoard and W&B (offline) as asked."""

from __future__ import annotations

import json
import math
from importlib.metadata import PackageNotFoundError

import pytest

from data.schema import UserError
from mokamm import machine
from mokamm.training.watch import Watch, check_report_to, read_metrics

TRAIN = {
    "step": 1, "epoch": 0.5, "loss": 1.25, "learning_rate": {"adapter": 1e-3, "projector": 1e-4}, "grad_norm": 0.5,
    "tokens_per_second": 100.0, "padding_share": 0.1, "data_wait_share": 0.02, "memory_gb": 1.5, "seconds": 2.0,
}  # fmt: skip
VALIDATION = {"step": 1, "epoch": 0.5, "loss": 2.5, "accuracy": 0.75, "samples": 8.0, "missing": 0.0}
NAMES = {
    "train/loss", "train/learning_rate/adapter", "train/grad_norm", "train/tokens_per_second", "train/padding_share",
    "train/data_wait_share", "train/memory_gb", "validation/loss", "validation/accuracy",
}  # fmt: skip


def watched(run, report_to):
    run.mkdir()
    watcher = Watch(run, 2, 0, report_to)
    watcher.record("train", TRAIN)
    watcher.record("validation", VALIDATION)
    watcher.close()
    assert read_metrics(run / "metrics.jsonl") == [{"kind": "train", **TRAIN}, {"kind": "validation", **VALIDATION}]


def test_a_loss_that_is_no_number_leaves_every_line_json(tmp_path):
    """jq and JavaScript refuse a bare NaN; it comes back as one, also after a resume has written the lines anew."""
    path = tmp_path / "metrics.jsonl"
    for first in (0, 1):
        watcher = Watch(tmp_path, 3, first, [])
        watcher.record("validation", {**VALIDATION, "step": first + 1, "loss": (math.nan, math.inf)[first]})
        watcher.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, None), (2, None)]
    assert [math.isnan(record["loss"]) for record in read_metrics(path)] == [True, True]


def test_tensorboard_holds_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched(tmp_path / "run", ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= NAMES
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.25)]


def test_wandb_offline_beside_tensorboard(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is an extra: uv sync --extra wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    watched(tmp_path / "run", ["tensorboard", "wandb"])
    wandb.teardown()  # W&B's own process writes the last records when it ends
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert all(name.encode() in content for name in NAMES)
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_wandb_that_is_not_installed_is_told_before_anything_is_built(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", missing)
    with pytest.raises(UserError, match="uv sync --extra wandb"):
        check_report_to(["tensorboard", "wandb"])
    check_report_to(["tensorboard"])
