"""eval/compare.py from a YAML file to table, plots and JSON: a small real plan on the miniature base, started as users do.

MOKAMM_SLOW_TESTS=1 adds signals and kills in the middle of a plan.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mokamm.training.watch import read_metrics

ROOT = Path(__file__).resolve().parents[2]
BAD = 1.0e30  # a rate that no run survives
METHODS = ("lora", "moka")


def write_plan(folder: Path, base: Path, world: Path, **changes: Any) -> Path:
    """The shipped av_text run, cut down to seconds: 2 of 10 segments, 3 steps of 2 rows, 6 + 3 test rows."""
    run = yaml.safe_load((ROOT / "configs/mini/av_text.yaml").read_text())
    run["model"]["llm"]["path"] = str(base / "llm")
    for name, path in (("vision", "vision"), ("audio", "audio.safetensors")):
        run["model"]["modalities"][name]["encoder"]["path"] = str(base / path)
        run["model"]["modalities"][name]["segments"] = 2
    data, options = run["data"], {"video_dir": "videos", "audio_dir": "audio"}
    del data["world"]
    data |= {"media_dir": str(world / "train"), "cache": {"dir": str(folder / "cache"), "max_gb": 1}}
    data["validation"] = [
        {"source": "music_avqa", "path": "avqa.json", "media_dir": str(world / "test"), "limit": 6, "options": options}
    ]
    run["training"] |= {
        "init_from": str(base / "stage1") if (base / "stage1").is_dir() else None, "max_steps": 3, "save_steps": 2,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "logging_steps": 1, "eval_steps": 3,
        "report_to": [], "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
    }  # fmt: skip
    run["evaluation"] = {
        "benchmarks": [
            {"benchmark": f"miniworld_{name}", "path": file, "media_dir": str(world / "test"), "limit": limit}
            for name, file, limit in (("avqa", "avqa.json", 6), ("events", "events.txt", 3))
        ] + [{"benchmark": "yes_no", "name": "own", "path": str(folder / "own.jsonl"), "media_dir": str(world / "test")}],
        "batch_size": 6, "max_new_tokens": 5,
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(run))
    picture = min(path.name for path in (world / "test/images").iterdir())
    own = {"question": "Is there a circle?", "answer": "yes", "image": f"images/{picture}"}
    (folder / "own.jsonl").write_text(json.dumps(own) + "\n")
    plan: dict[str, Any] = {
        "base": str(folder / "base.yaml"), "output_dir": str(folder / "out"),
        "overrides": {"training.deepspeed": None}, "rates": [1e-3, 1e-2], "extend": 0, "seeds": [0, 1],
        "methods": {name: {"overrides": {"adapter.method": name, "adapter.r": 2}} for name in METHODS},
    }  # fmt: skip
    plan["methods"][METHODS[1]]["rates"] = [1e-3, BAD]
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan | changes))
    return folder / "plan.yaml"


def command(*words: object) -> list[str]:
    return [sys.executable, *(str(word) for word in words)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def compare(plan: Path, *options: str, code: int = 0, by_name: bool = False) -> subprocess.CompletedProcess[str]:
    """by_name: as `mokamm compare`."""
    program = ("-m", "mokamm.cli", "compare") if by_name else (ROOT / "eval/compare.py",)
    done = subprocess.run(
        command(*program, plan, *options),
        env=ENVIRONMENT,
        cwd=plan.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done


def contents(run: Path) -> dict[str, Any]:
    """What a run has come to: its losses and weights."""
    from mokamm.weights import sha256

    losses = [(r["kind"], r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl")]
    return {"losses": losses, **{p.name: sha256(p) for p in sorted((run / "final").rglob("*.safetensors"))}}


def written(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, mini_base: Path, world: Path) -> Path:
    return write_plan(tmp_path_factory.mktemp("compare"), mini_base, world)


@pytest.fixture(scope="module")
def results(plan: Path) -> dict[str, Any]:
    done = compare(plan, "--json", "--jobs", "2")
    assert "media encoded" in done.stderr
    return json.loads(done.stdout)


def test_the_plan_is_carried_out_and_nothing_else(plan: Path, results: dict[str, Any]) -> None:
    runs = plan.parent / "out" / "runs"
    made = {path.parent.relative_to(runs).as_posix() for path in runs.rglob("outcome.json")}
    chosen = {method["name"]: method["chosen"] for method in results["methods"]}
    assert chosen["moka"] == 1e-3
    expected = {f"{name}/rate-{rate:g}-seed-0" for name, rate in [("lora", 1e-3), ("lora", 1e-2)]}
    expected |= {"moka/rate-0.001-seed-0", "moka/rate-1e+30-seed-0"}
    expected |= {f"{name}/rate-{chosen[name]:g}-seed-1" for name in METHODS}
    assert made == expected
    losses = {
        rate["rate"]: rate["runs"][0]["loss"] for m in results["methods"] if m["name"] == "lora" for rate in m["rates"]
    }
    assert chosen["lora"] == min(losses, key=lambda rate: losses[rate])
    scored = {path.parents[1].relative_to(runs).as_posix() for path in runs.rglob("own.metrics.json")}
    assert scored == {f"{name}/rate-{chosen[name]:g}-seed-{seed}" for name in METHODS for seed in (0, 1)}


def test_a_run_that_diverges_is_a_result_of_its_rate(plan: Path, results: dict[str, Any]) -> None:
    rates = next(m for m in results["methods"] if m["name"] == "moka")["rates"]
    assert rates[1]["runs"][0]["status"] == "diverged"
    assert "not finite" in rates[1]["runs"][0]["reason"]
    assert rates[1]["runs"][0]["loss"] is None
    report = (plan.parent / "out/report/report.md").read_text()
    assert "| diverged |" in report
    assert "0.001 ↓" in report  # the lowest of its grid


def test_figures_of_a_method(plan: Path, results: dict[str, Any]) -> None:
    llm = json.loads((Path(results["run_config"]["model"]["llm"]["path"]) / "config.json").read_text())
    width, inner, layers = llm["hidden_size"], llm["intermediate_size"], llm["num_hidden_layers"]
    heads = llm["num_attention_heads"] * llm["head_dim"]
    keys = llm["num_key_value_heads"] * llm["head_dim"]
    inputs, outputs = 5 * width + heads + inner, 2 * inner + heads + 2 * keys + 2 * width  # of the seven layers
    expected = {"lora": 2 * (inputs + outputs) * layers, "moka": 2 * (3 * inputs + outputs) * layers}
    for method in results["methods"]:
        assert method["trained_parameters"] == expected[method["name"]]
        assert method["projector_parameters"] > 0
        folder = plan.parent / "out/runs" / method["name"] / f"rate-{method['chosen']:g}-seed-0"
        files = [path for path in (folder / "final/adapter").rglob("*") if path.is_file()]
        assert method["adapter_bytes"] == sum(path.stat().st_size for path in files)
        assert method["checkpoint_bytes"] > method["adapter_bytes"]
        seconds = [r["seconds"] for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
        assert method["runs"][0]["figures"]["step_seconds"] == pytest.approx(sum(seconds[1:]) / 2)  # median of two
        assert 0.1 < method["memory_gb"] < 8
        assert method["calibration_steps"] == 0
        assert all(tree["figures"]["processor_seconds"] > 0 for tree in method["runs"])


def test_scores_are_those_of_the_predictions(plan: Path, results: dict[str, Any]) -> None:
    out = plan.parent / "out"
    for method in results["methods"]:
        for name, found in method["benchmarks"].items():
            shares = []
            for seed in (0, 1):
                predictions = out / f"runs/{method['name']}/rate-{method['chosen']:g}-seed-{seed}/predictions"
                rows = [json.loads(line) for line in (predictions / f"{name}.jsonl").read_text().splitlines()]
                shares.append(sum(row["points"] for row in rows) / sum(row["of"] for row in rows))
            assert found["seeds"] == pytest.approx(shares)
            assert found["mean"] == pytest.approx(sum(shares) / 2)
            assert (found["difference"] is None) == (method["name"] == "lora")


def test_a_second_start_runs_nothing_and_writes_the_same_report(plan: Path, results: dict[str, Any]) -> None:
    out = plan.parent / "out"
    before = written(out)
    again = compare(plan)
    assert written(out) == before
    assert json.loads((out / "report/results.json").read_text()) == results
    assert "| lora |" in again.stdout
    assert "media encoded" not in again.stderr
    for name in ("rates.png", "parameters.png"):
        assert (out / "report" / name).read_bytes().startswith(b"\x89PNG")
    listed = compare(plan, "--list").stdout
    assert listed.count(": finished") + listed.count(": diverged") == 6
    assert listed.count("finished, scored") == 4
    assert "0 trainings and 0 tests to do" in listed


def test_a_run_equals_that_of_the_training_command_and_goes_on_to_the_same(plan: Path, results: dict[str, Any]) -> None:
    """One of the runs three times: in the plan, by the command that --list prints, and from its middle, where a method
    that cannot be built takes nobody with it."""
    out = plan.parent / "out"
    chosen = next(m for m in results["methods"] if m["name"] == "moka")["chosen"]
    run = out / f"runs/moka/rate-{chosen:g}-seed-1"
    found = contents(run)
    lines = compare(plan, "--list").stdout.splitlines()
    line = lines[lines.index(f"moka, rate {chosen:g}, seed 1: finished, scored") + 1]
    words = line.split()[1:]
    words[0], alone = str(ROOT / words[0]), plan.parent / "alone"
    words = [word for word in words if not word.startswith("training.output_dir")]
    words += [f"training.output_dir={alone}", "evaluation.benchmarks=[]"]
    subprocess.run(command(*words), env=ENVIRONMENT, cwd=plan.parent, check=True, capture_output=True)
    assert contents(alone) == found

    before = {path: time for path, time in written(out).items() if run not in path.parents}
    for name in ("checkpoint-3", "final", "predictions"):  # as a kill after the save of step 2 leaves it
        shutil.rmtree(run / name)
    (run / "outcome.json").unlink()
    assert "1 trainings and 1 tests to do" in compare(plan, "--list").stdout
    done = compare(with_a_method_that_fails(plan), code=1, by_name=True)
    assert "resuming from" in (run / "log.txt").read_text()
    assert contents(run) == found
    assert json.loads((run / "outcome.json").read_text())["figures"]["seconds"] is None  # of two processes
    after = {path: time for path, time in written(out).items() if not {run, out / "runs/wrong"} & {*path.parents}}
    assert after == before
    assert "wrong, rate 0.001, seed 0: failed: " in done.stderr
    assert "no_such_layer" in done.stderr
    assert "| wrong | - | - | 0 | - | - | - | - | no rate: 1 failed; start again, or take it out |" in done.stdout


def with_a_method_that_fails(plan: Path) -> Path:
    """The same plan in the same folder with one method more, whose targets match nothing."""
    tree = yaml.safe_load(plan.read_text())
    overrides = {"adapter.method": "lora", "adapter.target_modules": ["no_such_layer"]}
    tree["methods"]["wrong"] = {"overrides": overrides, "rates": [1e-3]}
    plan.with_name("failing.yaml").write_text(yaml.safe_dump(tree))
    return plan.with_name("failing.yaml")


def test_another_plan_in_the_same_folder_is_refused(plan: Path, results: dict[str, Any]) -> None:
    tree = yaml.safe_load(plan.read_text())
    tree["overrides"]["training.max_steps"] = 4
    other = plan.with_name("other.yaml")
    other.write_text(yaml.safe_dump(tree))
    message = compare(other, code=2).stderr
    assert "holds runs of another plan" in message
    assert "training.max_steps is 3 there, 4 now" in message
    assert "Traceback" not in message


# ---- signals and kills, in the middle --------------------------------------------------------------------------------


@pytest.mark.skipif("MOKAMM_SLOW_TESTS" not in os.environ, reason="MOKAMM_SLOW_TESTS=1 runs it")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_plan_goes_on_to_the_same_results(
    tmp_path: Path, plan: Path, results: dict[str, Any], number: signal.Signals, mini_base: Path, world: Path
) -> None:
    """Stopped in the second training; its runs end by themselves, and the same command ends with equal weights."""
    again = write_plan(tmp_path, mini_base, world)
    out = tmp_path / "out"
    with subprocess.Popen(command(ROOT / "eval/compare.py", again), env=ENVIRONMENT, cwd=tmp_path, text=True,
                          stderr=subprocess.PIPE) as started:  # fmt: skip
        _wait_for(lambda: len(list(out.rglob("metrics.jsonl"))) == 2)
        finished = {path: path.stat().st_mtime_ns for path in out.rglob("outcome.json")}
        started.send_signal(number)
        _, said = started.communicate(timeout=120)
    assert started.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    if number != signal.SIGKILL:
        assert "stopped; to go on:" in said
    _wait_for(lambda: not _at_work(out))
    compare(again)
    assert len(finished) == 1
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    first = plan.parent / "out/runs"
    for run in (path.parent for path in (out / "runs").rglob("outcome.json")):
        if (run / "final").is_dir():
            assert contents(run) == contents(first / run.relative_to(out / "runs")), run


def _wait_for(condition: Any, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def _at_work(out: Path) -> list[str]:
    """Processes that have a file below the folder open: runs that are still at work."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if out in Path(os.readlink(link)).parents:
                found.append(link.parts[2])
        except OSError:
            continue
    return found
