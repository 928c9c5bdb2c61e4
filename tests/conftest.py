"""Fixtures that several floors share: the miniature base (the shipped one) and a small miniature world."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # no test fails because a machine is slow
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # torch is not imported yet; the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def mini_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the miniature base; random weights of the same files where the trained ones are not there yet."""
    shipped = ROOT / "mokamm" / "mini"
    if (shipped / "stage1").is_dir():
        return shipped
    from mokamm.mini.architecture import write_random

    folder = tmp_path_factory.mktemp("base")
    write_random(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered miniature world: 8 clips for training and 6 for the test."""
    from data.miniworld.write import write_split

    folder = tmp_path_factory.mktemp("world")
    write_split(folder, "train", 8, workers=1)
    write_split(folder, "test", 6, workers=1)
    return folder


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """tests/mokamm/toy_training.py: the real loop on a small model."""
    spec = importlib.util.spec_from_file_location("toy_training", ROOT / "tests" / "mokamm" / "toy_training.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_training"] = module
    spec.loader.exec_module(module)
    return module
