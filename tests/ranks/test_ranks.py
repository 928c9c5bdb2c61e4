"""The real model on two ranks that see different modalities; ranks that go away, or write to different folders.

The other methods, stages and ZeRO variants: `python -m tests.ranks.matrix`; the launchers: test_launchers.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.sources import open_source
from tests.ranks.cases import ROOT, Case, environment, free_port, launch, losses, settings
from tests.ranks.rows import PAIRS, write_rows

STEPS = 20


@pytest.fixture(scope="module")
def rows(world: Path) -> Path:
    write_rows(world / "train", 2 * STEPS)
    return world / "train"


# ---- mixed modalities ------------------------------------------------------------------------------------------------


def test_ranks_get_the_modalities_that_the_rows_mean_for_them(rows):
    from data.order import epoch_order

    file = open_source("messages", rows / "mixed.jsonl")
    line = [file[int(i)] for i in epoch_order(2 * STEPS, 0, 0)]
    kinds = {"video": "v", "audio": "a", "speech": "s", "image": "i"}
    for pair, wanted in enumerate(PAIRS):
        for rank in (0, 1):
            media = line[2 * pair + rank].media
            found = "".join("s" if m.modality == "speech" else kinds[m.kind] for m in media)
            assert found == wanted[rank]
    lengths = [len(sample.answer) for sample in line]
    assert max(lengths) > 20 * min(lengths)


def test_ranks_of_different_modalities_agree_with_one_rank_under_zero_2_and_3(rows, tmp_path):
    launch([sys.executable, "-m", "tests.ranks.cases"], [Case("one", settings(rows, tmp_path))], tmp_path)
    shared = settings(rows, tmp_path, per_device_train_batch_size=1)
    cases = [
        Case(name, {**shared, "training.deepspeed": f"configs/deepspeed/{name}.json"}) for name in ("zero2", "zero3")
    ]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "tests.ranks.cases"]
    launch(command, cases, tmp_path)
    expected = losses(tmp_path / "one")
    assert len(set(expected)) == STEPS
    for name in ("zero2", "zero3"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5)


def test_a_validation_of_rows_that_differ_by_rank_agrees_with_one_rank_where_projectors_are_sharded(rows, tmp_path):
    zero3 = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    validation = [{"source": "messages", "path": "mixed.jsonl", "limit": 9}]
    common = {**settings(rows, tmp_path, max_steps=2, eval_steps=1), "data.validation": validation}
    launch([sys.executable, "-m", "tests.ranks.cases"], [Case("one", common)], tmp_path)
    own = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "deepspeed": str(tmp_path / "zero3.json")}
    sharded = {**common, **{f"training.{key}": value for key, value in own.items()}}
    command = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "tests.ranks.cases"]
    launch(command, [Case("sharded", sharded)], tmp_path)
    expected = losses(tmp_path / "one", "validation")
    assert len(set(expected)) == 2
    assert losses(tmp_path / "sharded", "validation") == pytest.approx(expected, rel=1e-5)


# ---- a rank that is missing ------------------------------------------------------------------------------------------


def start(rank: int, port: str, run: str, rows: Path, folder: Path) -> subprocess.Popen[str]:
    """One of two ranks of mokamm/train.py (plain PyTorch), without a launcher that would stop the one for the other."""
    ranks = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    values = settings(rows, folder, per_device_train_batch_size=1, save_steps=1, max_steps=200)
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**values, "training.output_dir": run}.items()]
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "mokamm/train.py"), str(ROOT / "configs/quickstart.yaml"), *overrides],
        env={**environment(), **ranks}, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_rank_that_is_killed_is_named_by_the_other_and_nothing_whole_is_lost(rows, tmp_path):
    run, port = tmp_path / "run", free_port()
    ranks = [start(rank, port, str(run), rows, tmp_path) for rank in (0, 1)]
    while not (run / "checkpoint-1").is_dir():
        assert [rank.poll() for rank in ranks] == [None, None], ranks[0].communicate()
        time.sleep(0.2)
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].communicate()
    _, said = ranks[0].communicate(timeout=500)
    assert ranks[0].returncode == 75, said
    assert "rank 1 on" in said
    assert "Traceback" not in said
    newest = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert f"{newest} is whole; start the same command again, and it goes on from there" in said


def test_ranks_that_do_not_share_the_run_folder_are_told_before_anything_is_built(rows, tmp_path):
    port = free_port()
    ranks = [start(rank, port, "run", rows, tmp_path / f"host{rank}") for rank in (0, 1)]
    for rank in ranks:
        _, said = rank.communicate(timeout=500)
        assert rank.returncode == 2, said
        assert "is not the folder that rank 0 writes to" in said
        assert "Traceback" not in said
