"""A few kills by the documented command; the full run is `python -m tests.faults.kill CASE --times 100`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_killed_and_resumed_runs_are_bit_identical():
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.kill", "draws", "--times", "6", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["kills"] == sum(found["by_phase"].values()) == 6
    assert found["trainings_compared"] >= 1
    assert found["records_compared_each"] > 10
