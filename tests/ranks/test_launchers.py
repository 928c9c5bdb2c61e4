"""The same two ranks under every launcher, with the very same losses.

MOKAMM_SLOW_TESTS=1 python -m pytest tests/ranks/test_launchers.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.ranks.cases import ROOT, Case, environment, free_port, launch, losses, settings
from tests.ranks.rows import write_rows

LAUNCHERS = {
    "deepspeed": "deepspeed --num_gpus 2 --master_port {port} --module",
    "torchrun": "torchrun --nproc_per_node 2 --master_port {port} -m",
    "accelerate": "accelerate launch --multi_gpu --num_processes 2 --main_process_port {port} -m",
}
slow = pytest.mark.skipif("MOKAMM_SLOW_TESTS" not in os.environ, reason="takes minutes; set MOKAMM_SLOW_TESTS=1")


@slow
@pytest.mark.timeout(3000)
def test_every_launcher_gives_the_same_losses(world, tmp_path):
    steps = 6
    write_rows(world / "train", 2 * steps)
    shared = settings(world / "train", tmp_path, per_device_train_batch_size=1, max_steps=steps)
    zeros = [
        Case(name, {**shared, "training.deepspeed": f"configs/deepspeed/{name}.json"}) for name in ("zero2", "zero3")
    ]
    cases = [*zeros, Case("ddp", shared)]
    found = {}
    for launcher, command in LAUNCHERS.items():
        words = command.format(port=free_port()).split()
        launch([*words, "tests.ranks.cases"], cases, tmp_path / launcher)
        found[launcher] = {case.name: losses(tmp_path / launcher / case.name) for case in cases}
    assert found["torchrun"] == found["deepspeed"]
    assert found["accelerate"] == found["deepspeed"]
    assert len(set(found["deepspeed"]["zero2"])) == steps
    assert found["deepspeed"]["ddp"] == pytest.approx(found["deepspeed"]["zero2"], rel=1e-5)


def test_one_process_where_two_were_asked_for_is_refused():
    """accelerate launch --cpu leaves several processes to mpirun, and silently starts one."""
    config = str(ROOT / "configs/quickstart.yaml")
    done = subprocess.run(
        [sys.executable, str(ROOT / "mokamm/train.py"), config],
        env={**environment(), "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "accelerate launch --cpu starts one process" in done.stderr


MEET = """
from types import SimpleNamespace
from data.schema import UserError
from mokamm.training.launch import start, stop
try:
    ranks = start(SimpleNamespace(use_cpu=True, deepspeed=None, ddp_timeout=60, seed=0))
    print(ranks.world, ranks.sum([2.0]))
    stop(ranks)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("world", "said"), [("1", "1 [2.0]\n"), ("2", "at which the ranks meet, is taken on this host")]
)
def test_a_port_that_another_run_holds(world, said):
    """`deepspeed` and `torchrun` give every run on a host the same: one rank needs none, several are told of it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-c", MEET], env={**environment(), **place}, cwd=ROOT, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
    assert said in done.stdout
    assert world == "1" or f"port {port}" in done.stdout
