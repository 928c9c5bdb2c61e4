"""What figures were measured on: the processor, and the versions of libraries. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those libraries that have one: mokamm has none where it is found by PYTHONPATH alone."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def processors() -> list[str]:
    """The name of each of this machine's processors, as Linux counts and names them; empty where it does not."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
