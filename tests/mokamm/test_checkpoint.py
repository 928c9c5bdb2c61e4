"""Checkpoints: resumed runs are bit-identical, altered files are noticed, the last and the best are never lost."""

from __future__ import annotations

import json
import shutil
from datetime import date, timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.schema import UserError
from mokamm.training import checkpoint
from mokamm.training.checkpoint import TrainerState, newest_first
from mokamm.training.resume import DAY, begin, common
from mokamm.training.stream import plan
from mokamm.training.watch import read_metrics
from mokamm.weights import (
    MANIFEST,
    PROJECTORS,
    WeightsError,
    load_weights,
    manifest_problems,
    save_weights,
    write_manifest,
)

SCRIPT = Path(__file__).with_name("toy_training.py")


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """An uninterrupted run with dropout, accumulation and workers."""
    folder = tmp_path_factory.mktemp("whole")
    model, _ = toy.run(folder, toy.alone(), dropout=0.2, dataloader_num_workers=2)
    return folder, model


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_s_config_does_not_depend_on_the_process(whole):
    """PEFT keeps the names in a set, whose order changes with the hash seed."""
    folder, _ = whole
    names = json.loads((folder / "checkpoint-8/adapter/adapter_config.json").read_text())["target_modules"]
    assert len(names) > 3
    assert names == sorted(names)


def test_resume_is_bit_identical(toy, whole, tmp_path):
    folder, model = whole
    toy.run(tmp_path, toy.alone(), dropout=0.2, stop_after=6)  # logs two steps beyond its checkpoint
    resumed, _ = toy.run(tmp_path, toy.alone(), dropout=0.2)
    assert toy.losses(tmp_path) == toy.losses(folder)
    for name, tensor in weights_of(model).items():
        assert torch.equal(tensor, weights_of(resumed)[name]), name


def test_a_checkpoint_holds_trained_weights_only(toy, whole):
    folder, model = whole
    saved = newest_first(folder)[0]
    assert saved.name == "checkpoint-8"
    assert not manifest_problems(saved)
    names = sorted(p.name for p in saved.iterdir())
    assert names == [
        MANIFEST, "adapter", "optimizer-rank0.pt", PROJECTORS, "rng-rank0.pt", "trainer_state.json", "window-rank0.json"
    ]  # fmt: skip
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file() and p.suffix != ".json")
    assert stored < 4 * trained * 3 + 60_000  # weights and two moments; the base alone would be as much again
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_an_altered_or_cut_file_is_noticed_and_the_older_checkpoint_used(toy, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    newest, older = newest_first(run)[:2]
    adapter = newest / "adapter" / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    assert "altered" in manifest_problems(newest)[0]
    assert checkpoint.find(run, "auto") == older
    assert "passed over" in capsys.readouterr().out
    adapter.write_bytes(content[:-5])
    assert "bytes" in manifest_problems(newest)[0]
    (older / MANIFEST).unlink()
    assert checkpoint.find(run, "auto") is None
    with pytest.raises(UserError, match="cannot be used"):
        checkpoint.find(run, str(newest))
    assert checkpoint.find(run, None) is None


def test_a_run_that_differs_is_refused_with_the_reason(toy, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(UserError, match=r"training\.seed: 0 there, 1 now"):
        toy.run(tmp_path / "run", toy.alone(), dropout=0.2, seed=1)


def test_a_run_keeps_the_day_that_its_prompts_name(toy, whole, tmp_path):
    """Templates that print the day would give a resumed run other tokens."""
    shutil.copytree(whole[0], tmp_path / "run")
    state = tmp_path / "run/checkpoint-8/trainer_state.json"
    earlier = json.loads(state.read_text())
    assert earlier["same"][DAY] in {date.today().isoformat(), (date.today() - timedelta(1)).isoformat()}
    earlier["same"][DAY] = "2024-02-29"
    state.write_text(json.dumps(earlier))
    write_manifest(state.parent)
    config = toy.config(tmp_path / "run")
    begin(config, toy.corpus(tmp_path / "run"), toy.alone())
    assert config.model.llm.chat_date == date(2024, 2, 29)
    config.model.llm.chat_date = date(2024, 3, 1)
    with pytest.raises(UserError, match=r"model\.llm\.chat_date: '2024-02-29' there, '2024-03-01' now"):
        begin(config, toy.corpus(tmp_path / "run"), toy.alone())
    del earlier["same"][DAY]  # as of a version without it
    state.write_text(json.dumps(earlier))
    write_manifest(state.parent)
    begin(config, toy.corpus(tmp_path / "run"), toy.alone())
    assert config.model.llm.chat_date == date(2024, 3, 1)


def test_a_finished_run_trains_no_further(toy, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    _, best = toy.run(tmp_path / "run", toy.alone(), dropout=0.2)
    assert best.is_dir()
    assert toy.losses(tmp_path / "run") == toy.losses(whole[0])


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    checkpoint.rotate(tmp_path, 3, TrainerState(step=10, best={"step": 1}))
    assert [p.name for p in newest_first(tmp_path)] == ["checkpoint-10", "checkpoint-3", "checkpoint-1"]
    checkpoint.rotate(tmp_path, 1, TrainerState(step=3))  # checkpoint-10 is none of a run that stands at 3
    assert [p.name for p in newest_first(tmp_path)] == ["checkpoint-10", "checkpoint-3"]


@pytest.mark.parametrize("best", [None, 1, 2, 4])
@pytest.mark.parametrize("keep", [None, 1, 2, 3, 9])
def test_rotation_keeps_what_transformers_would(tmp_path, keep, best):
    """The best counts among save_total_limit."""
    from transformers.trainer_utils import rotate_checkpoints

    for name in ("ours", "theirs"):
        for step in (1, 2, 3, 4):
            (tmp_path / name / f"checkpoint-{step}").mkdir(parents=True)
    checkpoint.rotate(tmp_path / "ours", keep, TrainerState(step=4, best={"step": best} if best else None))
    theirs = tmp_path / "theirs"
    rotate_checkpoints(str(theirs), keep, str(theirs / f"checkpoint-{best}") if best else None)
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == sorted(p.name for p in theirs.iterdir())


def test_a_new_run_in_an_old_folder_moves_the_old_one_aside_whole(toy, whole, tmp_path, capsys):
    run, place = tmp_path / "run", tmp_path / "run" / "previous-1"
    shutil.copytree(whole[0], run)
    (run / "bad_samples.jsonl").write_text('{"source": "train", "row": 3, "id": "3", "reason": "gone"}\n')
    old = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    _, best = toy.run(run, toy.alone(), max_steps=2, save_steps=1, eval_steps=1, save_total_limit=1,
                      resume_from_checkpoint=None)  # fmt: skip
    assert f"is now in {place}: checkpoint-8, checkpoint-4" in capsys.readouterr().out
    assert {p.relative_to(place): p.read_bytes() for p in place.rglob("*") if p.is_file()} == old
    assert best.parent == run
    assert checkpoint.write_final(run, best).is_dir()
    assert checkpoint.find(run, "auto") == run / "checkpoint-2"
    assert {record["step"] for record in read_metrics(run / "metrics.jsonl")} == {1, 2}
    assert not (run / "bad_samples.jsonl").exists()
    toy.run(run, toy.alone(), max_steps=1, resume_from_checkpoint=None)
    assert (run / "previous-2" / "final").is_dir()


def test_resuming_from_an_older_checkpoint_moves_the_newer_ones_aside(toy, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    wanted = str(run / "checkpoint-4")
    toy.run(run, toy.alone(), dropout=0.2, stop_after=5, resume_from_checkpoint=wanted)
    assert [p.name for p in (run / "previous-1").iterdir()] == ["checkpoint-8"]
    assert checkpoint.find(run, "auto") == run / "checkpoint-4"


def test_resuming_from_another_folder_ends_with_a_result_of_its_own(toy, whole, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)  # of yet another run
    _, best = toy.run(run, toy.alone(), dropout=0.2, resume_from_checkpoint=str(whole[0] / "checkpoint-4"))
    assert best == run / "checkpoint-8"
    assert not manifest_problems(best)
    assert toy.losses(run) == toy.losses(whole[0])[4:]
    assert (run / "previous-1" / "checkpoint-4").is_dir()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"training": {"warmup_steps": 3}}, "training.warmup_steps"),
        ({"training": {"adam_beta2": 0.95}}, "training.adam_beta2"),
        ({"training": {"init_from": "runs/stage1"}}, "training.init_from"),
        ({"data": {"max_length": 77}}, "data.max_length"),
        ({"data": {"train": [{"source": "messages", "path": "toy.jsonl", "weight": 2.0}]}}, "data.train"),
        ({"model": {"modalities": {"b": "clip", "a": "clip"}}}, "model.modalities"),
    ],
)
def test_what_the_steps_depend_on_must_be_the_same(toy, tmp_path, changes, key):
    from mokamm.config import RunConfig

    def settings(**sections):
        tree = toy.config(tmp_path).to_dict()
        tree["model"]["modalities"] = {"a": "clip", "b": "clip"}
        for name, values in sections.items():
            tree[name] |= values
        encoders = tree["model"]["modalities"].items()
        tree["model"]["modalities"] = {name: {"encoder": {"name": encoder, "path": "p"}} for name, encoder in encoders}
        return common(RunConfig.model_validate(tree), plan(8, 2, 1, 1, 1.0, -1))

    (tmp_path / checkpoint.STATE).write_text(json.dumps({"step": 4, "same": settings()}))
    assert checkpoint.read_state(tmp_path, settings()).step == 4
    with pytest.raises(UserError, match=rf"  - {key}: .* now\n"):
        checkpoint.read_state(tmp_path, settings(**changes))
    older = {name: value for name, value in settings().items() if name != key}
    (tmp_path / checkpoint.STATE).write_text(json.dumps({"step": 4, "same": older}))
    assert checkpoint.read_state(tmp_path, settings(**changes)).step == 4


def test_final_has_the_weights_and_no_trainer_state(toy, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    source = newest_first(run)[0]
    final = checkpoint.write_final(run, source)
    checkpoint.write_final(run, source)  # again, over the first
    assert sorted(p.name for p in final.iterdir()) == [MANIFEST, "adapter", PROJECTORS]
    assert not manifest_problems(final)


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "moka", "full", "none"])
def test_weights_come_back_equal(toy, tmp_path, method):
    model, other = toy.build(method, seed=1), toy.build(method, seed=2)
    if method == "none":
        model.llm.load_state_dict(other.llm.state_dict())
    elif method != "full":
        other.llm.get_base_model().load_state_dict(model.llm.get_base_model().state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_weights(model, tmp_path)
    write_manifest(tmp_path)
    assert (tmp_path / "adapter").is_dir() == (method not in ("full", "none"))
    assert (tmp_path / "llm").is_dir() == (method == "full")
    load_weights(other, tmp_path)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_every_key_is_accounted_for(toy, tmp_path):
    model = toy.build()
    save_weights(model, tmp_path)
    projectors = load_file(tmp_path / PROJECTORS)
    name = next(iter(projectors))
    save_file(
        {f"{name}2": projectors[name], **{k: v for k, v in projectors.items() if k != name}}, tmp_path / PROJECTORS
    )
    with pytest.raises(WeightsError) as error:
        load_weights(model, tmp_path)
    assert f"missing: {name.removeprefix('projectors.')}" in str(error.value)
    assert "unexpected" in str(error.value)


def test_random_generators_go_on_where_they_stopped(toy, tmp_path):
    import random

    import numpy as np

    ranks = toy.alone()
    torch.save(checkpoint.random_state(ranks), tmp_path / "rng.pt")
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn())
    checkpoint.set_random_state(torch.load(tmp_path / "rng.pt", weights_only=True), ranks)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn()) == drawn


def test_trainer_state_is_json(whole):
    state = json.loads((newest_first(whole[0])[0] / checkpoint.STATE).read_text())
    assert state["step"] == 8
    assert set(state["best"]) == {"step", "loss", "accuracy"}
