"""eval/run.py from a run folder to metrics, with a real (random) miniature model, real media and every control."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.schema import Sample
from eval.benchmarks import BENCHMARKS
from eval.run import main

ROOT = Path(__file__).resolve().parents[2]
CLIPS = 4


@pytest.fixture(scope="module")
def run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, to write into."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "run")


def evaluate(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Standard output of a --json run, which must be one JSON object and nothing else."""
    capfd.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def predictions(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "predictions" / f"{name}.jsonl").read_text().splitlines()]


def test_all_benchmarks_in_one_go(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = evaluate(capfd, "all", str(run))
    assert result["control"] is None
    assert list(result["benchmarks"]) == [name for name in BENCHMARKS if name.startswith("miniworld_")]
    counts = {"avqa": 2 * CLIPS, "events": CLIPS - 1, "spoken": 3, "transcription": 3, "images": 2, "told": 2}
    for name, count in counts.items():
        metrics = result["benchmarks"][f"miniworld_{name}"]
        rows = predictions(run, f"miniworld_{name}")
        assert metrics == json.loads((run / "predictions" / f"miniworld_{name}.metrics.json").read_text())
        assert [row["index"] for row in rows] == list(range(count))
        assert metrics["rows"] == count
        assert metrics["score"] == pytest.approx(sum(r["points"] for r in rows) / sum(r["of"] for r in rows))
        assert metrics["settings"]["batch_size"] == 3
        page = f"examples/miniworld_{name}.html"
        assert f"({page})" in (run / "report" / "report.md").read_text()
        assert "data:image/jpeg" in (run / "report" / page).read_text() or name == "told"
    assert (run / "report" / "accuracy.png").is_file()  # though the folder has no metrics.jsonl
    avqa = predictions(run, "miniworld_avqa")
    assert [row["error"] is None for row in avqa] == [True] * 6 + [False] * 2  # the clip that is cut off
    assert "videos/3.mp4" in avqa[-1]["error"]
    assert not avqa[-1]["correct"]
    assert result["benchmarks"]["miniworld_avqa"]["bad"] == 2
    assert any(row["prediction"] for row in avqa)


def test_answers_do_not_depend_on_the_batch_and_equal_the_models_own(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mokamm.model import MultimodalLM

    evaluate(capfd, "miniworld_avqa", str(run), "--batch-size", "8")
    together = [row["prediction"] for row in predictions(run, "miniworld_avqa")]
    evaluate(capfd, "miniworld_avqa", str(run), "--batch-size", "1", "--limit", "4")
    assert [row["prediction"] for row in predictions(run, "miniworld_avqa")] == together[:4]
    model = MultimodalLM.from_run(run, device="cpu")
    folder = Path(model.config.data.media_dir or "") if model.config else Path()
    row = BENCHMARKS["miniworld_avqa"].load(folder / "avqa.json")[1]
    media = {"video": str(folder / "videos/0.mp4"), "audio": str(folder / "audio/0.wav")}
    assert isinstance(row.sample, Sample)
    assert model.chat(row.sample.prompt[-1].text, **media) == together[1]  # as many tokens as the evaluation, too


def test_answers_to_all_rows_do_not_give_way_to_those_of_a_few(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, names = run / "predictions", ["miniworld_told.jsonl", "miniworld_told.metrics.json"]
    evaluate(capfd, "miniworld_told", str(run))
    whole = [(folder / name).read_bytes() for name in names]
    for _ in range(2):  # a few do give way to a few
        assert main(["miniworld_told", str(run), "--limit", "1", "--json"]) == 0
        assert len(predictions(run, "miniworld_told")) == 1
    assert capfd.readouterr().err.count("the answers to all rows are now in") == 1
    (place,) = (place for place in folder.glob("previous-*") if (place / names[0]).is_file())
    assert [(place / name).read_bytes() for name in names] == whole


def test_controls_change_what_they_say(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answers = {}
    plain = evaluate(capfd, "miniworld_avqa", str(run), "--limit", "6")
    assert (plain["control"], plain["settings"]["limit"], plain["bad"]) == (None, 6, 0)
    answers["plain"] = [row["prediction"] for row in predictions(run, "miniworld_avqa")]
    for control in ("blind", "shuffle", "base", "adapter:vision"):
        metrics = evaluate(capfd, "miniworld_avqa", str(run), "--limit", "6", "--control", control)
        assert (metrics["control"], metrics["rows"], metrics["bad"]) == (control, 6, 0)
        stem = f"miniworld_avqa.{control.replace(':', '-')}"
        answers[control] = [row["prediction"] for row in predictions(run, stem)]
    blind = answers["blind"]
    assert blind[0] == blind[2] == blind[4]  # the same words, so the same answer whatever the clip
    assert blind[1] == blind[3] == blind[5]
    assert all(answers[control] != answers["plain"] for control in ("blind", "base", "adapter:vision"))
    # three clips of two like questions each: shuffled, every clip's answers are those of another clip
    pairs = {tuple(answers["plain"][i : i + 2]) for i in (0, 2, 4)}
    assert {tuple(answers["shuffle"][i : i + 2]) for i in (0, 2, 4)} == pairs


def test_a_spoken_question_can_be_asked_blind(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is left of it, and still every row is answered and counted."""
    metrics = evaluate(capfd, "miniworld_spoken", str(run), "--control", "blind")
    assert (metrics["rows"], metrics["bad"]) == (3, 0)


def test_answers_that_are_cut_at_the_runs_own_length_are_told_once(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["miniworld_images", str(run), "--limit", "2", "--max-new-tokens", "6"]) == 0
    assert "was cut" not in caplog.text  # as it was asked for
    assert main(["miniworld_images", str(run), "--batch-size", "1"]) == 0
    assert caplog.text.count("an answer was cut at 6 tokens (evaluation.max_new_tokens, or --max-new-tokens)") == 1


def test_a_table_for_people(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["miniworld_images", str(run)]) == 0
    out = capfd.readouterr().out
    for word in ("miniworld_images", "score", "accuracy (%)", "precision", "baseline: majority answer", "metrics"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["miniworld_avq", "RUN"], "did you mean 'miniworld_avqa'"),
        (["all", "RUN/nowhere"], "is no finished run"),
        (["all", "RUN", "--control", "blnd"], "did you mean 'blind'"),
        (["all", "RUN", "--control", "adapter:sight"], "has no modality 'sight'"),
        (["all", "RUN", "--path", "x.json"], "name it instead of 'all'"),
        (["miniworld_avq", "RUN", "--path", "x.json"], "did you mean 'miniworld_avqa'"),
        (["miniworld_avqa", "RUN", "--path", "absent.json"], "no such annotation file"),
        (["miniworld_avqa", "RUN", "--limit", "2", "--control", "shuffle"], "share one clip or picture"),
    ],
)
def test_mistakes_end_in_one_message(
    run: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert message in output.err


def test_ctrl_c_ends_in_one_message(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.run.load_model", interrupted)
    assert main(["miniworld_images", str(run), "--json"]) == 130
    assert capfd.readouterr() == ("", "stopped; the same command goes on from the answers that are kept\n")


@pytest.mark.parametrize("name", ["predictions", "report", "report/examples"])
def test_a_file_in_the_place_of_a_folder_is_told(
    small_run: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("")
    assert main(["miniworld_images", str(run)]) == 2
    place = run / name.partition("/")[0]
    assert f"error: {place} cannot be written: " in (told := capfd.readouterr().err)
    assert "a file lies where a folder should be" in told


def test_the_script_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "eval" / "run.py"), "all", "nowhere", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere is no finished run")
    assert "Traceback" not in done.stderr
