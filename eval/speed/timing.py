"""Seconds of several functions, taken in turns, so that whatever slows the machine down for a while slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def in_turns(
    functions: Mapping[Name, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Name, list[float]]:
    """Each function once to warm up, then `repeats` rounds of all of them: seconds per call, by name, in order.

    clock: time.process_time counts this process's own work, on a CPU that others use too.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for function in functions.values():
        function()
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            wait()
            began = clock()
            function()
            wait()
            seconds[name].append(clock() - began)
    return seconds
