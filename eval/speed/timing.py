"""Times functions in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable


def in_turns(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, by name: after one warm-up of each, `repeats` rounds in which each runs once.

    A function that starts work on a device has to wait for it before it returns.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds
