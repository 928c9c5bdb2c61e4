"""No operator mixes devices, and nothing in a step waits for one: seen on a device that computes nothing (toy_device.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("toy_device.py")


@pytest.fixture(scope="module")
def found(media_dir, mini_base) -> dict[str, str]:
    command = [sys.executable, str(SCRIPT), str(media_dir), str(mini_base)]
    ended = subprocess.run(command, cwd=SCRIPT.parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_pretended_device_refuses_what_a_gpu_would(found) -> None:
    assert found["waits"].startswith("DataDependentOutputException")
    assert "two different devices" in found["mixes"]


def test_methods_train_on_it_in_both_precisions_with_and_without_checkpointing(found) -> None:
    layers = {name: raised for name, raised in found.items() if "float" in name}
    assert len(layers) == 8 * 2 * 2
    assert not {name: raised for name, raised in layers.items() if raised}


def test_a_whole_model_trains_on_it_from_media_to_loss(found) -> None:
    assert {name: found[name] for name in ("whole", "packed")} == {"whole": "", "packed": ""}
