"""Seconds of several functions, taken in turns, so that whatever slows the machine down for a while slows all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def in_turns(
    functions: Mapping[Name, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Name, list[float]]:
    """Each function once to warm up, then `repeats` rounds of all of them: seconds per call, by name, round by round.

    Every round has an order of its own, the same in each measurement: what a function leaves in the caches, or asks the
    allocator for, would always meet the same successor.
    clock: time.process_time counts this process's own work, on a CPU that others use too.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for function in functions.values():
        function()
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    names, orders = list(functions), random.Random(0)
    for _ in range(repeats):
        for name in orders.sample(names, len(names)):
            wait()
            began = clock()
            functions[name]()
            wait()
            seconds[name].append(clock() - began)
    return seconds
