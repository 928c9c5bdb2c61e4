"""The names of parts whose registries cannot be looked into before torch is imported, or lie on a floor above.

A configuration is checked against them (mokamm/config_sections.py) in well below a second; tests hold each equal to its
registry. Encoders and sources are not here: theirs import nothing heavy.
"""

from __future__ import annotations

import re
from pathlib import Path

METHODS = (
    "moka", "multi_lora", "lora", "dora", "hira", "lori_d", "lori_s", "lori_moka_d", "lori_moka_s", "full", "none"
)  # fmt: skip  # mokamm.adapters.METHODS
LORI = ("lori_d", "lori_s", "lori_moka_d", "lori_moka_s")
DENSE = {"lori_s": "lori_d", "lori_moka_s": "lori_moka_d"}  # a sparse method: the dense one that its mask is cut from
WITHOUT_ADAPTERS = ("full", "none")  # those that wrap no layer
# methods that a quantized LLM cannot have, and why
NEEDS_WHOLE_WEIGHTS = {"hira": "multiplies the weights themselves", "full": "trains the weights themselves"}
ROUTED = ("moka", "multi_lora", "lori_moka_d", "lori_moka_s")  # those with a path for each modality
PROJECTORS = ("qformer", "mlp", "pooled", "perceiver")  # mokamm.projectors.PROJECTORS


def _benchmarks() -> tuple[str, ...]:
    """What the classes in eval/benchmarks call themselves, read as text: nothing here may import that floor."""
    files = (Path(__file__).resolve().parents[1] / "eval" / "benchmarks").glob("*.py")
    return tuple(name for file in files for name in re.findall(r'^    name = "(\w+)"', file.read_text(), re.M))


BENCHMARKS = _benchmarks()  # eval.benchmarks.BENCHMARKS
