"""The report: pictures that exist and show something, a table of every number that was measured."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.schema import UserError
from mokamm.report import read_results, results_table, running_mean, write_report
from mokamm.training.watch import describe, duration, forget_after, read_metrics, short

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    lines = []
    for step in range(10, 410, 10):
        factor = 0.5 * (1 + math.cos(math.pi * step / 400))
        record = {
            "kind": "train", "step": step, "epoch": step / 200,
            "loss": 2.2 * math.exp(-step / 120) + 0.3 + 0.08 * math.sin(step),
            "learning_rate": {"projector": 2e-4 * factor, "adapter": 1e-3 * factor}, "grad_norm": 1.0, "seconds": 4.0,
            "tokens_per_second": 2500.0, "padding_share": 0.1, "data_wait_share": 0.02, "memory_gb": 1.5,
        }  # fmt: skip
        lines.append(record)
        if step % 100 == 0:
            lines.append(
                {
                    "kind": "validation",
                    "step": step,
                    "epoch": step / 200,
                    "loss": 1 - step / 800,
                    "accuracy": step / 800,
                    "samples": 90,
                }
            )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    (tmp_path / "predictions").mkdir()
    for name, control, score in [
        ("miniworld_avqa", None, 0.71),
        ("miniworld_avqa", "shuffle", 0.38),
        ("miniworld_spoken", None, 0.625),
    ]:
        content = {
            "benchmark": name,
            "rows": 400,
            "score": score,
            "interval": [score - 0.05, score + 0.05],
            "unparsed": 3,
            "metrics": {
                "label_accuracy": 0.5,
                "baselines": {"majority_answer": 0.3},
                "types": {"Audio Counting": {"rows": 40, "accuracy": 0.25}},
            },
        }
        suffix = f".{control}" if control else ""
        (tmp_path / "predictions" / f"{name}{suffix}.metrics.json").write_text(
            json.dumps({**content, "control": control})
        )
    return tmp_path


def test_report_has_pictures_and_every_score(run):
    page = write_report(run).read_text()
    for name in ("loss_plot", "accuracy", "speed"):
        pixels = np.asarray(Image.open(run / "report" / f"{name}.png").convert("RGB"))
        assert pixels.shape[0] > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # something is drawn
    more = "label accuracy 50.0 %, baseline majority answer 30.0 %"
    assert f"| miniworld_avqa |  | 400 | 71.0 % | 66.0 - 76.0 | 3 | {more} |" in page
    assert "| miniworld_avqa | shuffle | 400 | 38.0 %" in page
    assert "| 400 | 0.5000 | 50.0 % |" in page
    assert "### miniworld_avqa: types" in page
    assert "| Audio Counting | 40 | 25.0 % |" in page
    assert "loss_plot.png" in page


def test_shares_of_the_run_weigh_a_line_by_its_time_and_its_places(run):
    """The first line is slow and waits; the last one stands for fewer steps."""
    first, last = {"seconds": 60.0, "data_wait_share": 0.5}, {"seconds": 20.0, "data_wait_share": 0.1}
    first |= {"tokens_per_second": 10.0, "padding_share": 0.25}  # 600 of 800 places
    last |= {"tokens_per_second": 60.0, "padding_share": 0.4}  # 1200 of 2000
    head = {"kind": "train", "epoch": 1.0, "loss": 1.0, "learning_rate": {"adapter": 1e-3}}
    head |= {"grad_norm": 1.0, "memory_gb": 1.0}
    lines = [{**head, "step": 10, **first}, {**head, "step": 12, **last}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(run).read_text()
    assert "| time in steps | 1:20 |" in page
    assert "| speed | 22 tokens/s, 40.0 % waiting for data |" in page  # 1800 in 80 s; 32 s of them
    assert "| padding | 35.7 % of all places |" in page  # 1000 of 2800


def test_report_without_evaluation(run):
    for path in (run / "predictions").iterdir():
        path.unlink()
    assert "Evaluation" not in write_report(run).read_text()
    assert (run / "report" / "accuracy.png").is_file()


def test_report_of_nothing(tmp_path):
    with pytest.raises(UserError, match="no training step"):
        write_report(tmp_path)


def test_the_command_tells_a_file_in_the_place_of_its_folder(run):
    (run / "report").write_text("")
    done = subprocess.run([sys.executable, "-m", "mokamm.report", run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {run / 'report'} cannot be written: File exists (a file lies where a folder")


def test_the_command_has_a_help():
    done = subprocess.run([sys.executable, "-m", "mokamm.report", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m mokamm.report [-h] [RUN]")


def test_results_are_sorted_with_controls_after(run):
    assert [(r["benchmark"], r["control"]) for r in read_results(run)] == [
        ("miniworld_avqa", None), ("miniworld_avqa", "shuffle"), ("miniworld_spoken", None)
    ]  # fmt: skip
    assert len(results_table([])) == 2


def test_metrics_beyond_a_checkpoint_are_forgotten(run):
    forget_after(run / "metrics.jsonl", 200)
    assert max(record["step"] for record in read_metrics(run / "metrics.jsonl")) == 200


def test_lines_for_people():
    assert [short(n) for n in (7, 1234, 5_600_000)] == ["7", "1.2k", "5.6M"]
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    values = {
        "step": 20,
        "epoch": 0.5,
        "loss": 1.25,
        "grad_norm": 0.5,
        "learning_rate": {"adapter": 1e-3},
        "tokens_per_second": 3210.0,
    }
    assert describe("train", values, 400, 90) == (
        "step  20/400  epoch 0.50  loss 1.2500  norm 0.50  adapter lr 1.0e-03  3.2k tokens/s  left 1:30"
    )
    assert running_mean([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]


def test_the_command_to_talk_runs_from_the_folder_of_the_training(run, tmp_path, monkeypatch, capsys):
    from mokamm.config import load_config
    from mokamm.training import finish

    config = load_config(ROOT / "configs" / "quickstart.yaml")
    named = tmp_path / "my run"
    named.mkdir()
    (run / "metrics.jsonl").rename(named / "metrics.jsonl")
    for folder in (tmp_path, ROOT):
        monkeypatch.chdir(folder)
        finish.write_up(config, named)
        program, told = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:3]
        assert (Path(program).resolve(), Path(told)) == (ROOT / "mokamm" / "infer.py", named)
        assert "\npython mokamm/infer.py " in (named / "README.md").read_text()  # a card holds no path of this machine
