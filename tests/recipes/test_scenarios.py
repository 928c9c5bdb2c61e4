"""Each scenario's recipes, a few steps each, in this process and through mokamm/train.py's main; the evaluation and
infer.py follow as they do by hand. The whole of it, through the deepspeed launcher: `python -m tests.recipes.run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mokamm import doctor, infer, train
from mokamm.training import finish
from mokamm.training.watch import read_metrics
from tests.recipes.scenarios import SCENARIOS, Scenario, prepare, sizes

STEPS = 4
SMALL = {  # of this test alone
    "deepspeed": "null", "bf16": "true", "report_to": "none", "dataloader_num_workers": 0, "learning_rate": 1e-2,
    "warmup_ratio": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1, "per_device_train_batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def splits(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world of all tests; its test split serves for validation too."""
    folder = tmp_path_factory.mktemp("splits")
    for name, split in (("train", "train"), ("validation", "test"), ("test", "test")):
        (folder / name).symlink_to(world / split)
    return folder


def evaluated_here(run: Path) -> int:
    """eval/run.py all RUN, without the imports of a process of its own."""
    from eval.run import main

    return main(["all", str(run)])


def doctored(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as end:
        doctor.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])  # a training has printed before
    assert end.value.code == 0, found
    return found


def assert_evaluated(scenario: Scenario, run: Path) -> None:
    """By the training itself, or by hand where its recipe names no benchmark; every row could be read."""
    if scenario.benchmark:
        from eval.run import main

        benchmark, path, media = scenario.benchmark
        assert main([benchmark, str(run), "--path", path, "--media-dir", media]) == 0
    metrics = [json.loads(path.read_text()) for path in (run / "predictions").glob("*.metrics.json")]
    assert [(one["bad"], one["rows"] > 0) for one in metrics] == [(0, True)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_stages_by_the_recipes_own_files(name, splits, tmp_path, monkeypatch, capsys) -> None:
    scenario = SCENARIOS[name]
    prepare(scenario, splits, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finish, "evaluate", evaluated_here)
    capsys.readouterr()
    for recipe in scenario.recipes:
        overrides = sizes(recipe, STEPS, **SMALL)
        predicted = doctored(capsys, str(recipe.path), *overrides)["parameters"]
        train.main([str(recipe.path), *overrides])
        run = Path("runs") / recipe.name
        records = list(read_metrics(run / "metrics.jsonl"))
        losses = [record["loss"] for record in records if record["kind"] == "train"]
        assert len(losses) == STEPS
        assert losses[-1] < losses[0], recipe.name
        found = yaml.safe_load((run / "config.yaml").read_text())["versions"]["trained_parameters"]
        assert sum(found.values()) == sum(part["trained"] for part in predicted.values())
        assert ("adapter" in found) == ("stage1" not in recipe.name)
        assert not (run / "bad_samples.jsonl").exists(), (run / "bad_samples.jsonl").read_text()
        told = yaml.safe_load(recipe.path.read_text())
        for begun in told["training"].get("init_from", []):  # what stage 1 wrote is where stage 2 looks for it
            assert (Path(begun) / "final" / "projectors.safetensors").is_file()
        if "stage1" not in recipe.name:
            assert_evaluated(scenario, run)
    capsys.readouterr()
    infer.main([str(run), *scenario.question, "--json"])
    assert isinstance(json.loads(capsys.readouterr().out)["answer"], str)


def test_the_stand_ins_of_clip_and_its_tower_agree(tmp_path) -> None:
    """CLIP's file holds the miniature base's tower: the features are those of open_clip's implementation."""
    import torch

    from encoders import build_encoder
    from tests.recipes import checkpoints

    checkpoints.write_clip(tmp_path)
    frames = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = build_encoder("clip", tmp_path / checkpoints.CLIP).encode(frames)
    theirs = build_encoder("open_clip", checkpoints.BASE / "vision").encode(frames)
    torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=2e-5)
