"""LoRI-S as a run: two phases in one command, killed in each and resumed; then one on the shipped base, asked and scored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from data.schema import UserError
from mokamm.adapter_folder import AdapterFolder
from mokamm.adapters import AdapterError, wrap
from mokamm.adapters.masks import unpack
from mokamm.config import RunConfig, load_config
from mokamm.init_from import begin_lori
from mokamm.lori_mask import cut, read_mask, write_mask
from mokamm.training import checkpoint, two_phase
from mokamm.training.launch import seed_everything
from mokamm.training.loop import fit
from mokamm.training.resume import begin
from mokamm.training.watch import read_metrics
from mokamm.weights import load_weights
from tests.ranks.cases import ROOT, settings, weights
from tests.ranks.rows import write_rows


class Killed(Exception):
    """Stands for a SIGKILL between two steps."""


def trainer(toy: Any, calls: list[str], kill: dict[str, int] | None = None) -> Callable[..., None]:
    """mokamm.train.train on the small model. kill: a method's run ends after that step, once."""
    kill = dict(kill or {})

    def train(config: RunConfig, folder: Path, ranks: Any) -> None:
        if two_phase.needs_mask(config):
            two_phase.calibrate(config, folder, ranks, train)
        folder.mkdir(parents=True, exist_ok=True)
        method = config.adapter.method
        calls.append(method)
        model = toy.build(method, seed=config.training.seed)
        begin_lori(model.llm, config)
        corpus = toy.corpus(folder)
        beginning = begin(config, corpus, ranks)
        two_phase.record(config, folder)
        seed_everything(config.training.seed)
        stop = kill.pop(method, None)
        best = fit(config, model, toy.parts_of(model), corpus, ranks, beginning, stop)
        if stop:
            raise Killed
        checkpoint.write_final(folder, best)

    return train


def toy_config(toy: Any, folder: Path, method: str = "lori_s", **adapter: Any) -> RunConfig:
    config = toy.config(folder, save_steps=3, eval_steps=3)
    for key, value in {"method": method, "sparsity": 0.8, **adapter}.items():
        setattr(config.adapter, key, value)
    return config


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]


@pytest.fixture(scope="module")
def whole(toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("lori") / "run"
    calls: list[str] = []
    trainer(toy, calls)(toy_config(toy, run), run, toy.alone())
    assert calls == ["lori_d", "lori_s"]
    return run


def test_two_phases_are_three_commands(toy: Any, whole: Path, tmp_path: Path) -> None:
    train, d, s = trainer(toy, []), tmp_path / "d", tmp_path / "s"
    dense = toy_config(toy, d, "lori_d")
    dense.training.learning_rate /= 10
    train(dense, d, toy.alone())
    write_mask(cut(d, 0.8), tmp_path / "mask.safetensors")
    train(toy_config(toy, s, mask=str(tmp_path / "mask.safetensors")), s, toy.alone())
    assert losses(s) == losses(whole)
    assert losses(d) == losses(whole / "lori_d")
    assert weights(s) == weights(whole)
    assert read_mask(tmp_path / "mask.safetensors").digest() == read_mask(whole / two_phase.MASK).digest()


def test_the_second_phase_begins_anew_under_the_mask_and_counts_the_first(whole: Path) -> None:
    first, second = losses(whole / "lori_d"), losses(whole)
    assert len(first) == len(second) == 8
    assert second[-1] < second[0]
    head = read_metrics(whole / "metrics.jsonl")[0]
    took = [
        record["seconds"] for record in read_metrics(whole / "lori_d" / "metrics.jsonl") if record["kind"] == "train"
    ]
    assert head == {"kind": "calibration", "step": 0, "epoch": 0.0, "steps": 8, "seconds": pytest.approx(sum(took)),
                    "loss": first[-1], "run": "lori_d"}  # fmt: skip
    mask, adapter = read_mask(whole / two_phase.MASK), AdapterFolder.open(whole)
    assert mask.digest() == adapter.mask().digest()
    assert mask.kept == round(0.2 * mask.total)
    assert mask.a_hash == adapter.a_hash == AdapterFolder.open(whole / "lori_d").a_hash
    sizes = [(run / "final/adapter/adapter_model.safetensors").stat().st_size for run in (whole, whole / "lori_d")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(("kill", "expected"), [
    ({"lori_d": 4}, ["lori_d", "lori_d", "lori_s"]),
    ({"lori_s": 4}, ["lori_d", "lori_s", "lori_s"]),
])  # fmt: skip
def test_a_killed_run_goes_on_in_the_phase_that_it_was_in(
    toy: Any, whole: Path, tmp_path: Path, kill: dict[str, int], expected: list[str]
) -> None:
    run, calls = tmp_path / "run", []
    train = trainer(toy, calls, kill)
    with pytest.raises(Killed):
        train(toy_config(toy, run), run, toy.alone())
    train(toy_config(toy, run), run, toy.alone())
    assert calls == expected
    assert losses(run) == losses(whole)
    assert losses(run / "lori_d") == losses(whole / "lori_d")
    assert weights(run) == weights(whole)
    assert not list(tmp_path.rglob("previous-*"))


def test_another_sparsity_or_seed_is_another_run(toy: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = trainer(toy, [], {"lori_s": 4})
    with pytest.raises(Killed):
        train(toy_config(toy, run), run, toy.alone())
    mask = (run / two_phase.MASK).read_bytes()
    with pytest.raises(UserError, match="comes from another run") as error:
        train(toy_config(toy, run, sparsity=0.5), run, toy.alone())
    assert "adapter.sparsity: 0.8 there, 0.5 now" in str(error.value)
    assert (run / two_phase.MASK).read_bytes() == mask
    with pytest.raises(UserError, match="comes from another run"):
        train(toy_config(toy, run, a_seed=1), run, toy.alone())
    before = losses(run)
    train(toy_config(toy, run), run, toy.alone())
    assert losses(run)[: len(before)] == before


def test_the_first_phase_may_be_shorter_and_has_its_own_rate(toy: Any, tmp_path: Path) -> None:
    config = toy_config(toy, tmp_path, calibration_share=0.25, calibration_learning_rate=3e-3)
    dense = two_phase.phase_one(config)
    assert (dense.training.max_steps, dense.training.learning_rate) == (2, 3e-3)
    assert dense.training.projector_learning_rate == config.training.projector_learning_rate
    config.adapter.calibration_learning_rate = None
    assert two_phase.phase_one(config).training.learning_rate == config.training.learning_rate / 10
    assert config.training.max_steps == 8
    config.adapter.init_from = "somewhere"
    assert two_phase.phase_one(config).adapter.init_a_only


def test_an_altered_adapter_or_another_seed_is_told_before_it_is_used(toy: Any, whole: Path) -> None:
    model = toy.build("lori_s")
    load_weights(model, whole / "final")
    other = toy.build("lori_s")
    other.llm = wrap(model.llm.unload(), "lori_s", ["text"], {"r": 4, "lora_alpha": 16, "a_seed": 1})
    with pytest.raises(AdapterError, match=r"trained with another A .*its a_seed is 0, this model's 1"):
        load_weights(other, whole / "final")


# ---- on the shipped base ---------------------------------------------------------------------------------------------


def real(world: Path, folder: Path, run: Path, **overrides: Any) -> RunConfig:
    values = settings(world / "train", folder, max_steps=3, save_steps=3)
    values |= {"training.output_dir": str(run), "adapter.method": "lori_s", "adapter.sparsity": 0.9, **overrides}
    return load_config(
        ROOT / "configs/quickstart.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()]
    )


@pytest.mark.skipif("MOKAMM_SLOW_TESTS" not in os.environ, reason="four models are built; set MOKAMM_SLOW_TESTS=1")
def test_a_real_run_trains_answers_and_is_gone_on_from(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.run import main as evaluate
    from mokamm import infer
    from mokamm.train import run as train

    monkeypatch.chdir(ROOT)
    write_rows(world / "train", 6)
    run = tmp_path / "run"
    train(real(world, tmp_path, run))
    assert losses(run)[0] == losses(run / "lori_d")[0]  # B is 0 again, and the projectors are those of init_from
    mask = read_mask(run / two_phase.MASK)
    assert mask.kept == round(0.1 * mask.total)
    moved = tmp_path / "moved"
    run.rename(moved)  # what a run needs lies in its final/
    test = world / "test"
    where = ["--path", str(test / "avqa.json"), "--media-dir", str(test)]
    assert evaluate(["miniworld_avqa", str(moved), *where, "--limit", "2"]) == 0
    capsys.readouterr()
    infer.main([str(moved), "--video", str(next((test / "videos").iterdir())), "What is there?", "--json"])
    assert json.loads(capsys.readouterr().out)["question"] == "What is there?"

    from transformers import AutoModelForCausalLM

    llm = AutoModelForCausalLM.from_pretrained(ROOT / "mokamm/mini/llm")
    plain = PeftModel.from_pretrained(llm, moved / "final/adapter")
    assert plain.peft_config["default"].peft_type == "LORI_S"

    second = tmp_path / "second"
    write_mask(cut(moved / "lori_d", 0.95), tmp_path / "mask.safetensors")
    options = {"adapter.init_from": str(moved), "adapter.mask": str(tmp_path / "mask.safetensors")}
    train(real(world, tmp_path, second, **options))
    old, new, mask = AdapterFolder.open(moved), AdapterFolder.open(second), read_mask(tmp_path / "mask.safetensors")
    changed = 0
    for name, (_, shape) in new.layers.items():
        inside = unpack(mask.bits[name], shape[0] * shape[1]).view(shape)
        assert torch.equal(new.b(name)[~inside], old.b(name)[~inside])
        changed += int((new.b(name) != old.b(name)).sum())
    assert changed > 0.9 * mask.kept
