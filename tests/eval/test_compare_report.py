"""From what runs left to tables and plots: results.py, report.py and the measurements of work.py, by hand."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from data.schema import UserError
from eval.benchmarks import BENCHMARKS
from eval.comparison.differences import difference, holm, sign_flips
from eval.comparison.plan import DIVERGED, FINISHED, Outcome
from eval.comparison.plots import side_by_side, styles
from eval.comparison.progress import Progress, look
from eval.comparison.report import page, verdict, write_report
from eval.comparison.results import gather
from eval.comparison.settings import CompareConfig, Comparison, Run
from eval.comparison.shown import Shown
from eval.comparison.work import (
    as_of_now,
    calibration_steps,
    final_validation,
    read_outcome,
    settings_of,
    step_seconds,
    write_outcome,
)
from mokamm.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
CLIPS = 12
EASE = {"lora": 4, "moka": 11, "bad": 1}  # clips answered right by seed 0; by each further seed one less


def comparison(out: Path) -> Comparison:
    """Three methods at one rate; `bad` diverges with its last seed."""
    methods = {name: {"overrides": {"adapter.method": "lora"}} for name in EASE}
    tree = {
        "base": "configs/mini/av_text.yaml", "output_dir": "-", "rates": [1e-3], "methods": methods,
        "overrides": {"training.deepspeed": None, "evaluation.benchmarks.1.benchmark": "miniworld_images"},
    }  # fmt: skip
    return Comparison(CompareConfig.model_validate(tree), out)


def answer(found: Comparison, run: Run) -> None:
    """Predictions of two questions a clip: the first is right in the first clips, the second never."""
    folder = run.folder(found.out) / "predictions"
    folder.mkdir(parents=True)
    for name in ("miniworld_avqa", "miniworld_images"):
        right = EASE[run.method] - run.seed
        rows = [
            {"unit": f"clip {c}", "points": float(k == 0 and c < right), "of": 1.0}
            for c in range(CLIPS)
            for k in (0, 1)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.metrics.json").write_text(json.dumps({"score": right / CLIPS / 2}))


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    found = comparison(tmp_path)
    known = {}
    for method in EASE:
        for seed in SEEDS:
            run = Run(method, 1e-3, seed)
            if method == "bad" and seed == 2:
                known[run] = Outcome(DIVERGED, reason="step 3: a loss that is not finite")
                continue
            figures = {
                "trained_parameters": {"projector": 10, "adapter": 1000}, "step_seconds": 0.1 * (1 + seed),
                "memory_gb": 1.0 + seed, "checkpoint_bytes": 9000, "adapter_bytes": 4000, "seconds": 60.0, "threads": 1,
                "jobs": 2,
            }  # fmt: skip
            known[run] = Outcome(FINISHED, validation={"loss": 0.5 + seed, "accuracy": 0.6}, figures=figures)
            answer(found, run)
    return Progress(found, known)


def test_scores_differences_and_corrections(progress: Progress) -> None:
    import numpy as np

    results = gather(progress)
    trees = {method["name"]: method for method in results["methods"]}
    table = {
        name: np.array(
            [[float(c < EASE[name] - seed) for c in range(CLIPS)] for seed in SEEDS[: 2 if name == "bad" else 3]]
        )
        for name in EASE
    }
    of = np.full(CLIPS, 2.0)
    tests = [(name, benchmark) for name in ("moka", "bad") for benchmark in results["benchmarks"]]
    expected = {name: difference(table[name], table["lora"], of) for name in ("moka", "bad")}
    flips = {name: sign_flips(table[name].mean(0) - table["lora"].mean(0)) for name in ("moka", "bad")}
    corrected = dict(zip(tests, holm([expected[name].p for name, _ in tests]), strict=True))
    corrected_flips = dict(zip(tests, holm([flips[name] for name, _ in tests]), strict=True))
    for name, benchmark in tests:
        found = trees[name]["benchmarks"][benchmark]
        assert found["mean"] == pytest.approx(table[name].mean() / 2)
        gap = found["difference"]
        assert gap["mean"] == pytest.approx(expected[name].mean)
        assert gap["interval"] == pytest.approx(expected[name].interval)
        assert gap["p_methods"] == pytest.approx(expected[name].p)
        assert gap["p_methods_holm"] == pytest.approx(corrected[name, benchmark])
        assert gap["p_clips_holm"] == pytest.approx(corrected_flips[name, benchmark])
    assert trees["lora"]["benchmarks"]["miniworld_avqa"]["difference"] is None
    assert trees["lora"]["benchmarks"]["miniworld_avqa"]["seeds"] == pytest.approx([4 / 24, 3 / 24, 2 / 24])


def test_tables_say_what_the_tree_says(progress: Progress, tmp_path: Path) -> None:
    results = gather(progress)
    lines = page(results)
    moka = next(line for line in lines if line.startswith("| moka | 41.7 |"))  # (11 + 10 + 9) / 3 / 24
    assert "| 3 | 0.001 = | +29.2 (" in moka
    assert moka.endswith("| better |")
    bad = next(line for line in lines if line.startswith("| bad | 2.1 |"))  # (1 + 0) / 2 / 24
    assert "| 2 of 3 |" in bad
    assert next(line for line in lines if line.startswith("| lora | 12.5 |")).endswith("| reference |")
    costs = next(line for line in lines if line.startswith("| moka | 1,000 |"))
    assert costs == "| moka | 1,000 | 1,010 | 200 | 1.00 | 3.00 | 4 | 9 | 60 |"
    assert "| moka | **1.500 (60.0)** |" in lines  # the mean loss of three seeds
    assert "| bad | **diverged (1 of 3)** |" in lines
    path = write_report(results, tmp_path / "report")
    assert json.loads((path.parent / "results.json").read_text()) == json.loads(json.dumps(results))
    for name in ("rates.png", "parameters.png"):
        assert f"({name})" in path.read_text()
        assert (path.parent / name).stat().st_size > 10_000


def test_a_report_names_the_gpu(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert ", gpu NVIDIA H200, " in page(gather(progress))[-1]


def test_a_checkout_that_is_not_installed_has_a_report_too(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str, known: Any = metadata.version) -> str:
        if name == "mokamm":
            raise metadata.PackageNotFoundError(name)
        return str(known(name))

    monkeypatch.setattr(metadata, "version", version)
    machine = gather(progress)["machine"]
    assert "mokamm" not in machine
    assert machine["torch"] == version("torch")


def test_fewer_errors_are_better() -> None:
    for mean, lower, said in (
        (0.1, False, "better"),
        (0.1, True, "worse"),
        (-0.1, True, "better"),
        (-0.1, False, "worse"),
    ):
        assert verdict({"mean": mean, "lower_is_better": lower, "p_methods_holm": 0.01}) == said
    assert verdict({"mean": 0.1, "lower_is_better": True, "p_methods_holm": 0.2}) == "not told apart"
    assert {name for name, benchmark in BENCHMARKS.items() if benchmark.lower_is_better} == {"asr", "librispeech"}


def test_a_comparison_that_has_not_begun_and_one_in_its_middle_have_a_report_too(
    tmp_path: Path, progress: Progress
) -> None:
    empty = gather(Progress(comparison(tmp_path / "empty")))
    text = write_report(empty, tmp_path / "a").read_text()
    assert text.count("| not run yet |") == 6
    del progress.known[Run("moka", 1e-3, 2)], progress.known[Run("lora", 1e-3, 0)]
    text = write_report(gather(progress), tmp_path / "b").read_text()
    assert "| lora | - | - | 0 | - |" in text  # its only rate has to be run again
    assert "| moka | 43.8 |" in text
    assert "| 2 of 3 | 0.001 = | - | - | - | not tested |" in text  # there is no reference to be told from
    assert "| reference |" not in text


def test_a_method_that_trains_the_projectors_alone_has_its_place_in_the_report(
    progress: Progress, tmp_path: Path
) -> None:
    for run, outcome in progress.known.items():
        if run.method == "moka":
            outcome.figures["trained_parameters"] = {"projector": 10}
    text = write_report(gather(progress), tmp_path / "report").read_text()
    assert "| moka | 0 | 10 |" in text


def test_runs_that_went_on_after_a_stop_tell_no_time(progress: Progress, tmp_path: Path) -> None:
    def table() -> list[str]:
        return [line for line in page(gather(progress)) if line.startswith("| moka | 1,000 |")]

    for seed, took in ((0, 10.0), (1, 90.0), (2, 30.0)):
        progress.known[Run("moka", 1e-3, seed)].figures["seconds"] = took
    assert table()[0].endswith("| 9 | 30 |")
    progress.known[Run("moka", 1e-3, 0)].figures["seconds"] = None
    assert table()[0].endswith("| 9 | 60 |")
    for seed in SEEDS:
        progress.known[Run("moka", 1e-3, seed)].figures["seconds"] = None
    assert table()[0].endswith("| 9 | - |")
    assert Shown(progress, 1).time_left() != "?"  # by the other methods' runs


def test_steps_that_a_method_trains_beyond_the_others_are_told(progress: Progress) -> None:
    assert not any("Steps before these" in line for line in page(gather(progress)))
    records = [{"kind": "calibration", "step": 0, "steps": 150}, line(5, 1.0), {"kind": "validation", "step": 5}]
    for run, outcome in progress.known.items():
        if run.method == "moka":
            outcome.figures["calibration_steps"] = calibration_steps(records)
    assert any(said.startswith("Steps before these, for the mask alone (LoRI's first phase): moka 150.")
               for said in page(gather(progress)))  # fmt: skip
    assert calibration_steps(records[1:]) == 0


def test_runs_that_answered_other_rows_are_not_compared(progress: Progress) -> None:
    path = Run("moka", 1e-3, 1).folder(progress.comparison.out) / "predictions/miniworld_avqa.jsonl"
    path.write_text(path.read_text().replace('"clip 3"', '"clip 99"'))
    with pytest.raises(UserError, match="answers other rows than the other runs did"):
        gather(progress)


# ---- measurements ----------------------------------------------------------------------------------------------------


def config(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs/mini/av_text.yaml", ["training.deepspeed=null", *overrides])


def line(step: int, seconds: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "seconds": seconds}


def test_the_step_time_is_a_median_without_the_first_stretch() -> None:
    records = [line(5, 99.0), line(10, 1.0), {"kind": "validation", "step": 10}, line(15, 4.0), line(17, 1.0)]
    assert step_seconds(records) == 0.5  # 0.2, 0.8, 0.5
    assert step_seconds(records[:1]) is None


def test_the_final_validation_is_that_of_the_weights_that_are_kept() -> None:
    def found(step: int, loss: float, accuracy: float) -> dict[str, Any]:
        return {"kind": "validation", "step": step, "loss": loss, "accuracy": accuracy, "samples": 9, "missing": 0}

    records = [found(1, 0.5, 0.1), found(2, 0.7, 0.9), line(2, 1.0), found(3, float("nan"), 0.2), found(4, 0.6, 0.2)]
    assert final_validation(records, config("training.metric_for_best_model=loss"))["step"] == 1
    assert final_validation(records, config("training.metric_for_best_model=accuracy"))["step"] == 2
    assert final_validation(records, config("training.load_best_model_at_end=false"))["step"] == 4


def test_outcomes_are_read_back_and_failures_are_tried_again(tmp_path: Path) -> None:
    outcome = Outcome(FINISHED, validation={"loss": 0.1, "accuracy": 1.0}, figures={"step_seconds": None})
    write_outcome(tmp_path, outcome, config())
    assert read_outcome(tmp_path) == outcome
    assert outcome.settings["training"]["learning_rate"] == 1.5e-3
    assert "output_dir" not in outcome.settings["training"]  # a folder may be moved
    write_outcome(tmp_path, Outcome("failed", "a crash"), config())
    assert read_outcome(tmp_path) is None
    (tmp_path / "outcome.json").write_text("{")
    assert read_outcome(tmp_path) is None


def test_runs_of_an_earlier_plan_are_taken_in_when_they_become_due(tmp_path: Path) -> None:
    """A rate was added to a plan that was carried out: until it is known, the seeds of the best one are not due."""
    found = comparison(tmp_path)
    found.config.rates, found.config.extend = [1e-3, 3e-3], 0
    found.config.methods = {"lora": found.config.methods["lora"]}

    def carry_out(rate: float, seed: int, loss: float) -> None:
        run = Run("lora", rate, seed)
        outcome = Outcome(FINISHED, validation={"loss": loss, "accuracy": 0.5}, figures={"seconds": 60.0})
        run.folder(found.out).mkdir(parents=True, exist_ok=True)
        write_outcome(run.folder(found.out), outcome, found.run_config(run))

    for seed in SEEDS:
        carry_out(1e-3, seed, 0.5)
    progress = look(found)
    assert [str(task.run) for task in progress.ready() if task.kind == "train"] == [str(Run("lora", 3e-3, 0))]
    carry_out(3e-3, 0, 0.9)
    progress.recall()
    assert not [task for task in progress.ready() if task.kind == "train"]
    assert len(progress.known) == 4


def test_settings_of_an_older_version_get_the_defaults_of_what_it_did_not_know() -> None:
    settings = settings_of(config())
    older = json.loads(json.dumps(settings))
    del older["adapter"]["exclude_modules"], older["training"]["loss_spike"]
    assert as_of_now(older) == settings
    older["model"]["modalities"].pop("audio")
    assert as_of_now(older) != settings
    assert as_of_now({"from": "elsewhere"}) == {"from": "elsewhere"}


def test_methods_differ_in_colour_and_marker_and_the_reference_alone_is_grey() -> None:
    names = ["lora", *(f"method {k}" for k in range(12))]  # as many as the main comparison has
    looks = styles({"reference": "lora", "methods": [{"name": name, "group": None} for name in names]})
    colours = {name: colour for name, (colour, _) in looks.items()}
    assert len(set(colours.values())) == len({marker for _, marker in looks.values()}) == len(names)
    assert all(max(colours[name][:3]) - min(colours[name][:3]) > 0.1 for name in names[1:])
    together = styles({"reference": "lora", "methods": [{"name": name, "group": "one"} for name in names]})
    assert len({together[name][0] for name in names[1:]}) == 1


def test_counts_that_would_lie_on_each_other_stand_side_by_side() -> None:
    places = side_by_side({"a": 100, "b": 100, "c": 102, "d": 500}, apart=1.1)
    assert sorted(places, key=lambda name: places[name]) == ["a", "b", "c", "d"]
    assert places["b"] / places["a"] == pytest.approx(1.1)
    assert places["d"] == pytest.approx(500)
    assert abs(places["b"] - 100.7) < 0.5
