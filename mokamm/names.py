"""The names of parts whose registries cannot be looked into before torch is imported, or lie on a floor above.

A configuration is checked against them (mokamm/config.py) in well below a second; tests hold each equal to its
registry. Encoders and sources are not here: theirs import nothing heavy.
"""

from __future__ import annotations

import re
from pathlib import Path

METHODS = ("moka", "multi_lora", "lora", "dora", "hira", "full", "none")  # mokamm.adapters.METHODS
WITHOUT_ADAPTERS = ("full", "none")  # of them, those that wrap no layer
PROJECTORS = ("qformer", "mlp", "pooled", "perceiver")  # mokamm.projectors.PROJECTORS


def _benchmarks() -> tuple[str, ...]:
    """What the classes in eval/benchmarks call themselves, read as text: nothing here may import that floor."""
    files = (Path(__file__).resolve().parents[1] / "eval" / "benchmarks").glob("*.py")
    return tuple(name for file in files for name in re.findall(r'^    name = "(\w+)"', file.read_text(), re.M))


BENCHMARKS = _benchmarks()  # eval.benchmarks.BENCHMARKS
