"""An evaluation that is killed, goes on, and is divided over ranks: the same predictions, no row answered twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from eval.run import main
from tests.ranks.cases import environment, free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "eval" / "run.py")
NAMES = [f"miniworld_{name}" for name in ("avqa", "events", "spoken", "transcription", "images", "told")]
# eval/run.py, that tells which rows it asks and which are answered, and takes its time before each batch
SLOW = """
import sys, time
from pathlib import Path
from mokamm.model import MultimodalLM

log, seconds = Path(sys.argv[1]).open("a"), float(sys.argv[2])
generate = MultimodalLM.generate

def told(self, batch, *rest, **more):
    names = " ".join(sample.id for sample in batch["samples"])
    print("asked", names, file=log, flush=True)
    time.sleep(seconds)
    texts = generate(self, batch, *rest, **more)
    print("answered", names, file=log, flush=True)
    return texts

MultimodalLM.generate = told
from eval.run import main
sys.exit(main(sys.argv[3:]))
"""
slow = pytest.mark.skipif("MOKAMM_SLOW_TESTS" not in os.environ, reason="takes a minute; set MOKAMM_SLOW_TESTS=1")


def start(log: Path, seconds: float, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(log), str(seconds), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env={**environment(), **variables}, stdout=pipe, stderr=pipe, text=True, cwd=log.parent
    )


def start_two(log: Path, seconds: float, *arguments: str) -> list[subprocess.Popen[str]]:
    """Two ranks, as a launcher starts them."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(log, seconds, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in (0, 1)]


def journalled(run: Path) -> list[str]:
    """All lines of all journals of a run but the headers."""
    paths = sorted((run / "predictions").glob("*.journal-*/*.jsonl"))
    return [line for path in paths for line in path.read_text().splitlines()[1:]]


def logged(log: Path, word: str) -> Counter[str]:
    lines = [line.split() for line in log.read_text().splitlines()]
    return Counter(name for first, *names in lines if first == word for name in names)


def predictions(run: Path) -> dict[str, bytes]:
    return {name: (run / "predictions" / f"{name}.jsonl").read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def whole(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, evaluated in one go."""
    run = shutil.copytree(small_run, tmp_path_factory.mktemp("whole") / "run")
    assert main(["all", str(run)]) == 0
    assert not list((run / "predictions").glob("*.journal-*"))
    return run


@pytest.fixture(scope="module")
def killed(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, its evaluation killed while the third batch of two rows was being answered; beside it the log."""
    folder = tmp_path_factory.mktemp("killed")
    run = shutil.copytree(small_run, folder / "run")
    process = start(folder / "log", 1.0, "all", str(run), "--batch-size", "2")
    while len(journalled(run)) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return run


def copied(run: Path, folder: Path) -> tuple[Path, Path]:
    """A killed run and its log, to go on with."""
    return shutil.copytree(run, folder / "run"), Path(shutil.copy(run.parent / "log", folder / "log"))


def test_killed_and_resumed_no_row_is_answered_twice(whole, killed, tmp_path, monkeypatch, capfd):
    run, log = copied(killed, tmp_path)
    before = [json.loads(line) for line in journalled(run)]
    assert 4 <= len(before) < 8
    (path,) = (run / "predictions").glob("*.journal-*/*.jsonl")
    answered = [line["index"] for line in before if line["error"] is None]
    missed = next(index for index in range(6) if index not in answered)  # its media were not there, and came later
    bad_line = json.dumps({"index": missed, "prediction": "", "error": "not found"}) + "\n"
    path.write_bytes(path.read_bytes() + bad_line.encode() + b'{"index": 0, "predict')  # torn, as by a kill in a write
    assert not list((run / "predictions").glob("*.jsonl"))
    from mokamm.model import MultimodalLM

    generate = MultimodalLM.generate

    def told(self, batch, *rest, **more):
        with log.open("a") as file:
            print("answered", *(sample.id for sample in batch["samples"]), file=file)
        return generate(self, batch, *rest, **more)

    monkeypatch.setattr(MultimodalLM, "generate", told)
    assert main(["all", str(run)]) == 0  # with another batch size
    assert predictions(run) == predictions(whole)
    times = logged(log, "answered")
    assert times
    ids = [json.loads(line)["id"] for content in predictions(run).values() for line in content.splitlines()]
    # rows of different benchmarks share ids (spoken and transcription); the clip that is cut off is asked and not answered
    bad = {row["id"] for row in map(json.loads, predictions(run)["miniworld_avqa"].splitlines()) if row["error"]}
    assert times == Counter(name for name in ids if name not in bad)
    assert f"{len(answered)} of 8 rows were answered before" in capfd.readouterr().err
    assert not list((run / "predictions").glob("*.journal-*"))
    metrics = json.loads((run / "predictions" / "miniworld_avqa.metrics.json").read_text())
    assert metrics["settings"]["answered_before"] == len(answered)


def test_other_settings_do_not_go_on_from_the_journal(killed, tmp_path, capfd):
    run, _ = copied(killed, tmp_path)
    (journal,) = (run / "predictions").glob("*.journal-*")
    kept = {path.name: path.read_bytes() for path in journal.iterdir()}
    weights = run / "final" / "projectors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    arguments = ["miniworld_avqa", str(run), "--max-new-tokens", "2", "--limit", "2"]
    assert main(arguments) == 0
    said = capfd.readouterr().err
    (note,) = [line for line in said.splitlines() if line.startswith("note: ")]
    for word in (str(journal), "weights", "max_new_tokens", "limit"):
        assert word in note
    assert "answered before" not in said
    assert {path.name: path.read_bytes() for path in journal.iterdir()} == kept
    weights = run / "final" / "projectors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")


def test_two_ranks_go_on_where_one_was_killed_and_give_the_same(whole, killed, tmp_path):
    """Of six benchmarks one has answers already, and one has a single batch: a rank idles."""
    run, log = copied(killed, tmp_path)
    ranks = start_two(log, 0.0, "all", str(run), "--json")
    (out, said), (silence, other) = (rank.communicate(timeout=550) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said[-3000:] + other[-3000:]
    assert predictions(run) == predictions(whole)
    assert silence == ""
    result = json.loads(out)
    assert list(result["benchmarks"]) == NAMES
    for name in NAMES:
        alone = json.loads((whole / "predictions" / f"{name}.metrics.json").read_text())
        apart = result["benchmarks"][name]
        assert apart["settings"].pop("ranks") == 2
        assert alone["settings"].pop("ranks") == 1
        for metrics in (alone, apart):
            for key in ("run", "seconds", "answered_before"):
                del metrics["settings"][key]
        assert apart == alone
    assert (said + other).count("rows could not be used") == 1
    assert (run / "report" / "report.md").is_file()


@slow
@pytest.mark.timeout(1500)
def test_a_rank_that_is_killed_is_named_and_nothing_is_lost(whole, small_run, tmp_path):
    run, log = shutil.copytree(small_run, tmp_path / "run"), tmp_path / "log"
    ranks = start_two(log, 1.0, "all", str(run), "--batch-size", "2")
    while len(journalled(run)) < 4:
        assert [rank.poll() for rank in ranks] == [None, None], ranks[0].communicate()
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].communicate()
    out, said = ranks[0].communicate(timeout=500)
    assert ranks[0].returncode == 75, said
    assert out == ""
    assert "rank 1 on" in said
    assert "start the same command again" in said
    assert "Traceback" not in said
    assert main(["all", str(run)]) == 0
    assert predictions(run) == predictions(whole)


@slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "launcher", ["torchrun --nproc_per_node 3 --master_port {port}", "deepspeed --num_gpus 2 --master_port {port}"]
)
def test_launchers_and_more_ranks_than_batches(whole, small_run, tmp_path, launcher):
    run = shutil.copytree(small_run, tmp_path / "run")
    command = [*launcher.format(port=free_port()).split(), SCRIPT, "all", str(run)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert predictions(run) == predictions(whole)


@slow
@pytest.mark.timeout(1500)
def test_a_mistake_under_a_launcher_is_told_once(small_run):
    command = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), SCRIPT, "miniworld_avq", str(small_run)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode != 0
    assert done.stderr.count("did you mean 'miniworld_avqa'") == 1
    assert "Traceback" not in done.stderr
