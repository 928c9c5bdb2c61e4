"""A comparison's configuration and plan: what is refused before the first run, and which run comes next."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval import compare
from eval.comparison.plan import DIVERGED, FAILED, FINISHED, Outcome, beyond, stand
from eval.comparison.progress import Progress, look
from eval.comparison.settings import CompareConfig, Comparison, Run, load_comparison, written
from mokamm.config import ConfigError, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs/compare").glob("*.yaml") if path.stem not in ("common", "methods"))


def tree(**changes: Any) -> dict[str, Any]:
    methods = {
        "lora": {"overrides": {"adapter.method": "lora"}},
        "moka": {"overrides": {"adapter.method": "moka", "adapter.r": 2}, "rates": [0.1, 0.3]},
    }
    overrides = {"training.deepspeed": None, "training.max_steps": 7}
    base = {"base": "configs/mini/av_text.yaml", "output_dir": "out", "overrides": overrides, "methods": methods}
    return base | {"rates": [1e-3, 3e-3, 1e-2]} | changes


def load(folder: Path, **changes: Any) -> Comparison:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(tree(**changes)))
    return load_comparison(path)


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, **changes)
    return str(caught.value)


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_a_run_is_the_base_with_the_overrides_of_all_of_its_method_and_its_own(tmp_path: Path) -> None:
    comparison = load(tmp_path)
    run = Run("moka", 3e-5, 4)
    config = comparison.run_config(run)
    assert (config.adapter.method, config.adapter.r, config.training.max_steps) == ("moka", 2, 7)
    assert (config.training.learning_rate, config.training.seed, config.training.deepspeed) == (3e-5, 4, None)
    assert config.training.output_dir == "out/runs/moka/rate-3e-05-seed-4"
    # as on the command line of mokamm/train.py
    assert load_config("configs/mini/av_text.yaml", comparison.overrides(run)) == config


@pytest.mark.parametrize("value", [1e-5, 0.1, None, "lora", True, 7, [], ["a", 1.5], {"x": 1e-7}, "1e-5", "a: b", "ü"])
def test_overrides_are_written_so_that_they_are_read_back(value: Any) -> None:
    (text,) = written({"a.b": value})
    key, _, after = text.partition("=")
    assert (key, yaml.safe_load(after)) == ("a.b", value)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratez": [1e-3]}, ["unknown key 'ratez'", "did you mean 'rates'"]),
        ({"rates": []}, ["rates"]),
        ({"rates": [1e-2, 1e-3]}, ["rates must rise"]),
        ({"rates": [1e-3, 1e-3]}, ["rates must rise"]),
        ({"rates": [-1.0, 1e-3]}, ["rates.0", "greater than 0"]),
        ({"seeds": [1, 1]}, ["each seed may stand there once"]),
        ({"seeds": []}, ["seeds"]),
        ({"seeds": [0], "rate_seeds": 2}, ["rate_seeds is 2, but there are 1 seeds"]),
        ({"extend": -1}, ["extend"]),
        ({"choose_by": "luck"}, ["choose_by", "'loss' or 'accuracy'"]),
        ({"reference": "lroa"}, ["no method 'lroa'", "did you mean 'lora'"]),
        ({"methods": {}}, ["methods"]),
        ({"overrides": {"training.learning_rate": 1.0, "training.deepspeed": None}}, ["set by the comparison itself"]),
        ({"overrides": {"training.seed": 1, "training.deepspeed": None}}, ["set by the comparison itself"]),
        ({"overrides": {}}, ["training.deepspeed is configs/deepspeed/zero2.json", "training.deepspeed: null"]),
        ({"overrides": {"training.deepspeed": None, "training.stage": 1}}, ["training.stage is 1"]),
        ({"overrides": {"training.deepspeed": None, "data.validation": []}}, ["data.validation is empty"]),
        ({"overrides": {"training.deepspeed": None, "evaluation.benchmarks": []}}, ["evaluation.benchmarks is empty"]),
        (
            {
                "overrides": {
                    "training.deepspeed": None,
                    "evaluation.benchmarks": [{"benchmark": "mme", "path": "tests", "media_dir": "tests"}],
                }
            },
            ["the score of mme is no share of its rows", "eval/score.py --against"],
        ),
        (
            {
                "overrides": {
                    "training.deepspeed": None,
                    "evaluation.benchmarks": [
                        {"benchmark": "mmau", "path": "tests", "media_dir": "tests", "options": {"speach_as": "speech"}}
                    ],
                }
            },
            ["evaluation.benchmarks: mmau has no option 'speach_as'", "did you mean 'speech_as'"],
        ),
        (
            {"overrides": {"training.deepspeed": None, "training.resume_from_checkpoint": None}},
            ["training.resume_from_checkpoint must be auto"],
        ),
        (
            {"overrides": {"training.deepspeed": None, "training.max_stepz": 3}},
            ["base with", "unknown key 'max_stepz'"],
        ),
        ({"base": "configs/mini/av_txt.yaml"}, ["no such configuration file", "av_text.yaml"]),
        ({"overrides": {"training.deepspeed": None, "training.init_from": "nowhere"}}, ["no such folder: nowhere"]),
    ],
)
def test_mistakes_are_found_before_the_first_run(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(tmp_path, **changes)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("a/b", {}, ["methods.a/b"]),
        ("..", {}, ["methods.."]),
        ("long", {"overrides": {"training.max_steps": 99}}, ["below 'adapter.' only", "training.max_steps"]),
        ("odd", {"overrides": {"adapter.method": "mokka"}}, ["method odd", "'mokka'; did you mean 'moka'"]),
        ("zero", {"overrides": {"adapter.r": 0}}, ["method zero", "adapter.r"]),
        ("fast", {"rates": [1.0, 0.5]}, ["methods.fast.rates", "must rise"]),
        ("typo", {"rate": [1.0]}, ["methods.typo", "unknown key 'rate'; did you mean 'rates'"]),
    ],
)
def test_mistakes_of_a_method(tmp_path: Path, name: str, method: dict[str, Any], words: list[str]) -> None:
    message = refusal(tmp_path, methods={**tree()["methods"], name: method})
    for word in words:
        assert word in message


def test_all_mistakes_of_all_methods_are_told_at_once(tmp_path: Path) -> None:
    bad = {name: {"overrides": {"adapter.r": 0}} for name in ("one", "two")}
    message = refusal(tmp_path, methods={**tree()["methods"], **bad})
    assert message.count("adapter.r") == 2


def test_only_some_methods(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(tree()))
    assert list(load_comparison(path, only=["lora"]).config.methods) == ["lora"]
    for only, word in ((["lora", "mocha"], "did you mean 'moka'"), (["moka"], "the reference 'lora' must be among")):
        with pytest.raises(ConfigError, match=word):
            load_comparison(path, only=only)


def test_extending_merges_overrides_and_methods_by_key(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(yaml.safe_dump(tree()))
    (tmp_path / "above.yaml").write_text(
        "extends: below.yaml\noutput_dir: there\noverrides: {training.max_steps: 9}\nmethods:\n"
        "  moka: {overrides: {adapter.r: 3}}\n  last: {rates: [0.1, 0.2]}\n"
    )
    config = load_comparison(tmp_path / "above.yaml").config
    assert config.overrides == {"training.deepspeed": None, "training.max_steps": 9}
    assert [method.name for method in config.methods.values()] == ["lora", "moka", "last"]
    assert config.methods["moka"].overrides == {"adapter.method": "moka", "adapter.r": 3}
    assert config.output_dir == "there"
    above = (tmp_path / "above.yaml").read_text()
    (tmp_path / "above.yaml").write_text(above.replace("[0.1, 0.2]", "[0.2, 0.1]"))
    with pytest.raises(ConfigError, match=r"methods\.last\.rates \(line 6\)"):
        load_comparison(tmp_path / "above.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_comparisons_load(path: Path) -> None:
    comparison = load_comparison(path)
    for method in comparison.config.methods.values():
        assert len(comparison.config.grid(method)) >= 5
        assert len(comparison.config.seeds) >= 3
    assert comparison.run_config(comparison.any_run()).data.cache is not None


# ---- plan ------------------------------------------------------------------------------------------------------------


def config(**changes: Any) -> CompareConfig:
    return CompareConfig.model_validate(tree(**changes))


def validated(loss: float, accuracy: float = 0.5) -> Outcome:
    return Outcome(FINISHED, validation={"loss": loss, "accuracy": accuracy})


def known(losses: dict[tuple[float, int], float | str], method: str = "lora") -> dict[Run, Outcome]:
    return {
        Run(method, rate, seed): Outcome(loss) if isinstance(loss, str) else validated(loss)
        for (rate, seed), loss in losses.items()
    }


def test_first_all_rates_on_the_first_seed() -> None:
    plan = config(seeds=[5, 6, 7])
    found = stand(plan, plan.methods["lora"], known({(3e-3, 5): 1.0}))
    assert found.todo == [Run("lora", 1e-3, 5), Run("lora", 1e-2, 5)]
    assert (found.chosen, found.later) == (None, 2)


def test_then_the_other_seeds_at_the_best_rate() -> None:
    plan = config(seeds=[5, 6, 7])
    sweep = known({(1e-3, 5): 2.0, (3e-3, 5): 1.0, (1e-2, 5): 3.0})
    found = stand(plan, plan.methods["lora"], sweep)
    assert (found.chosen, found.end) == (3e-3, "")
    assert found.todo == [Run("lora", 3e-3, 6), Run("lora", 3e-3, 7)]
    assert found.runs == [Run("lora", 3e-3, seed) for seed in (5, 6, 7)]
    whole = sweep | known({(3e-3, 6): 1.0, (3e-3, 7): 9.0})
    assert stand(plan, plan.methods["lora"], whole).trained


def test_a_grid_whose_best_rate_lies_at_its_end_grows_as_often_as_it_may() -> None:
    plan = config(seeds=[0], extend=2)
    rising = known({(1e-3, 0): 1.0, (3e-3, 0): 2.0, (1e-2, 0): 3.0})
    found = stand(plan, plan.methods["lora"], rising)
    assert found.todo == [Run("lora", 3.3e-4, 0)]
    lower = rising | known({(3.3e-4, 0): 0.5})
    found = stand(plan, plan.methods["lora"], lower)
    assert found.todo == [Run("lora", 1.1e-4, 0)]
    inside = stand(plan, plan.methods["lora"], lower | known({(1.1e-4, 0): 0.7}))
    assert (inside.chosen, inside.end, inside.todo) == (3.3e-4, "", [])
    still = stand(plan, plan.methods["lora"], lower | known({(1.1e-4, 0): 0.1}))
    assert (still.chosen, still.end, still.todo) == (1.1e-4, "lowest", [])
    up = stand(plan, plan.methods["lora"], known({(1e-3, 0): 3.0, (3e-3, 0): 2.0, (1e-2, 0): 1.0}))
    assert up.todo == [Run("lora", 3.3e-2, 0)]
    never = config(seeds=[0], extend=0)
    assert stand(never, never.methods["lora"], rising).end == "lowest"
    one = config(rates=[1e-3], seeds=[0])
    assert stand(one, one.methods["lora"], rising).end == "only"


def test_the_next_rate_keeps_the_step() -> None:
    assert beyond([3e-4, 1e-3, 3e-3], "highest") == 9e-3
    assert beyond([3e-4, 1e-3, 3e-3], "lowest") == 9e-5


def test_a_rate_that_diverged_is_not_chosen() -> None:
    plan = config(seeds=[0])
    found = stand(plan, plan.methods["lora"], known({(1e-3, 0): 2.0, (3e-3, 0): 1.0, (1e-2, 0): DIVERGED}))
    assert (found.chosen, found.end) == (3e-3, "")
    nothing = stand(plan, plan.methods["lora"], known({(1e-3, 0): DIVERGED, (3e-3, 0): DIVERGED, (1e-2, 0): DIVERGED}))
    assert (nothing.chosen, nothing.todo, nothing.runs) == (None, [], [])


def test_no_rate_is_chosen_while_one_failed() -> None:
    """The next start may find it the best; the test split is not answered at another one before."""
    plan = config()
    outcomes = {(1e-3, 0): 2.0, (3e-3, 0): 1.0, (1e-2, 0): FAILED}
    found = stand(plan, plan.methods["lora"], known(outcomes))
    assert (found.chosen, found.todo, found.runs) == (None, [], [])
    assert stand(plan, plan.methods["lora"], known({**outcomes, (1e-2, 0): 1.5})).chosen == 3e-3


def test_rates_are_chosen_by_loss_or_accuracy_and_by_the_mean_of_rate_seeds() -> None:
    outcomes = {
        Run("lora", 1e-3, 0): validated(1.0, 0.5),
        Run("lora", 3e-3, 0): validated(1.1, 0.7),
        Run("lora", 1e-2, 0): validated(1.2, 0.7),
    }
    for by, best in (("loss", 1e-3), ("accuracy", 3e-3)):  # of equal accuracy the lower loss
        plan = config(seeds=[0], extend=0, choose_by=by)
        assert stand(plan, plan.methods["lora"], outcomes).chosen == best
    two = {(1e-3, 0): 1.0, (1e-3, 1): 4.0, (3e-3, 0): 2.0, (3e-3, 1): 2.0, (1e-2, 0): 9.0}
    plan = config(seeds=[0, 1, 2], rate_seeds=2)
    assert stand(plan, plan.methods["lora"], known({**two})).todo == [Run("lora", 1e-2, 1)]
    found = stand(plan, plan.methods["lora"], known({**two, (1e-2, 1): 9.0}))
    assert (found.chosen, found.todo) == (3e-3, [Run("lora", 3e-3, 2)])
    one_diverged = stand(plan, plan.methods["lora"], known({**two, (3e-3, 1): DIVERGED, (1e-2, 1): 9.0}))
    assert one_diverged.todo == [Run("lora", 3.3e-4, seed) for seed in (0, 1)]  # 1e-3 leads now, and is the lowest


@pytest.mark.parametrize(
    ("program", "start"), [("eval/compare.py", "python eval/compare.py"), ("mokamm compare", "mokamm compare")]
)
def test_a_stopped_plan_tells_the_command_that_was_given(
    program: str, start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", interrupted)
    monkeypatch.setattr(sys, "argv", [program, "my plan.yaml", "--jobs", "2"])
    assert compare.main() == 130
    assert capsys.readouterr().err == f"stopped; to go on:\n  {start} 'my plan.yaml' --jobs 2\n"


def test_json_is_all_that_standard_output_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = [str(ROOT / "configs/compare/rates.yaml"), "--out", str(tmp_path / "out"), "--json"]
    assert compare.main([*plan, "--list"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["done"], len(found["runs"]), found["left"]["train"]) == (0, 28, 30)
    assert {key: found["runs"][0][key] for key in ("method", "rate", "seed", "state")} == {
        "method": "lora", "rate": 5e-4, "seed": 0, "state": "to do",
    }  # fmt: skip

    def talkative(comparison: Comparison, jobs: int) -> Progress:
        print("making the miniature world")
        subprocess.run([sys.executable, "-c", "print('the world is made')"], check=True)
        return look(comparison)

    monkeypatch.setattr(compare, "run_all", talkative)
    assert compare.main(plan) == 0
    told = capfd.readouterr()
    assert json.loads(told.out)["reference"] == "lora"
    assert "miniature world\nthe world is made\n" in told.err
