"""Training on two hosts, of which one dies: the other stops and says what to do; started again, the run goes on.

    MOKAMM_SLOW_TESTS=1 python -m pytest tests/cluster       some minutes; two network namespaces, root not needed

Both hosts share the disk, as the run folder of several nodes must be. Each runs the launcher for itself:
deepspeed --hostfile FILE --no_ssh --node_rank I --master_addr ADDRESS mokamm/train.py CONFIG
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, Switch, why_not
from tests.ranks.cases import ROOT, environment, losses, settings, weights
from tests.ranks.rows import write_rows

pytestmark = [
    pytest.mark.skipif("MOKAMM_SLOW_TESTS" not in os.environ, reason="takes minutes; set MOKAMM_SLOW_TESTS=1"),
    pytest.mark.timeout(3000),
]
STEPS, TIMEOUT = 16, 60


@pytest.fixture(scope="module")
def hosts():
    reason = why_not()
    if reason:
        pytest.skip(reason)
    switch = Switch()
    try:
        yield switch.add("host-a"), switch.add("host-b")
    finally:
        switch.close()


class Cluster:
    """The same command on every host, with the host's own number."""

    def __init__(self, hosts: tuple[Host, ...], world: Path, folder: Path) -> None:
        self.hosts, self.world, self.folder = hosts, world, folder
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
        write_rows(world / "train", 2 * STEPS)
        self.started = 0

    def start(self, run: Path) -> None:
        training = settings(
            self.world / "train", self.folder, max_steps=STEPS, save_steps=2, per_device_train_batch_size=1,
            ddp_timeout=TIMEOUT, resume_from_checkpoint="auto", deepspeed="configs/deepspeed/zero2.json",
        )  # fmt: skip
        overrides = [
            f"{key}={json.dumps(value)}" for key, value in {**training, "training.output_dir": str(run)}.items()
        ]
        self.started += 1
        for number, host in enumerate(self.hosts):
            command = ["deepspeed", "--hostfile", str(self.hostfile), "--no_ssh", "--node_rank", str(number)]
            command += ["--master_addr", self.hosts[0].address, "--master_port", str(29600 + self.started)]
            command += ["mokamm/train.py", "configs/quickstart.yaml", *overrides]
            host.start(command, ROOT, environment(), self.log(host))

    def log(self, host: Host) -> Path:
        return self.folder / f"{host.name}-{self.started}.log"

    def until_step(self, run: Path, step: int) -> None:
        while len(losses(run)) < step:
            for host in self.hosts:
                assert host.process is not None
                assert host.process.poll() is None, self.log(host).read_text()[-4000:]
            time.sleep(0.2)

    def wait(self, host: Host) -> int:
        """Its exit code. A host that hangs is found by the timeout of the wait."""
        assert host.process is not None
        return host.process.wait(timeout=TIMEOUT + 900)

    def whole(self, run: Path) -> None:
        self.start(run)
        for host in self.hosts:
            assert self.wait(host) == 0, self.log(host).read_text()[-4000:]


@pytest.fixture(scope="module")
def cluster(hosts, world, tmp_path_factory) -> Cluster:
    return Cluster(hosts, world, tmp_path_factory.mktemp("cluster"))


def test_a_host_dies_the_other_stops_and_both_go_on(cluster: Cluster):
    a, b = cluster.hosts
    undisturbed, run = cluster.folder / "undisturbed", cluster.folder / "run"
    cluster.whole(undisturbed)

    cluster.start(run)
    cluster.until_step(run, 3)
    b.cut_power()
    assert cluster.wait(a) == 75
    said = cluster.log(a).read_text()
    assert (
        f"no answer from rank 1 on host-b (10.77.0.2) for {TIMEOUT} s (training.ddp_timeout), nor from the host" in said
    )
    assert re.search(r"run/checkpoint-\d+ is whole; start the same command again on every host, and it goes on", said)
    assert "Traceback" not in said
    print(said[said.index("\nerror") :])

    b.plug(True)
    cluster.start(run)
    cluster.until_step(run, 8)
    a.kill()  # its connections are closed by its kernel
    assert cluster.wait(b) == 75
    said = cluster.log(b).read_text()
    assert "rank 0 on host-a (10.77.0.1) ended" in said
    assert "is whole; start the same command again on every host" in said
    print(said[said.index("\nerror") :])

    cluster.whole(run)
    assert "resuming from" in cluster.log(a).read_text()
    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)
