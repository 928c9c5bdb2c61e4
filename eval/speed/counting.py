"""Figures that no other program on the machine can disturb: operators, waits, bytes kept for backward, peak bytes.

operations(step)      operators that reach the backend, views left out (CPU); kernels that ran on the device (CUDA)
waits(step)           how often the host waits for a device: on a CPU, operators that would wait on a GPU
saved_bytes(forward)  storages that the graph holds until backward, each once, parameters left out
peak_bytes(step)      most bytes allocated at once by a step, above what was allocated before it
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]

# fmt: off
VIEWS = {
    "view", "_unsafe_view", "expand", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "split",
    "split_with_sizes", "detach", "alias", "as_strided", "unbind", "_reshape_alias",
}
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
# fmt: on


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.partition("::")[2]
        self.operators[name] += name not in VIEWS
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.waits += by_mask or name in WAITS
        return func(*args, **(kwargs or {}))


def operations(step: Step, device: str = "cpu") -> int:
    step()  # what is computed once per batch is there now
    if device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
        return sum(event.count for event in seen.key_averages() if event.device_type == DeviceType.CUDA)
    with _Seen() as mode:
        step()
    return sum(mode.operators.values())


def waits(step: Step, device: str = "cpu") -> int:
    step()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in told)
    with _Seen() as mode:
        step()
    return mode.waits


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # a storage's address is its name only while it lives

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def peak_bytes(step: Step, device: str = "cpu") -> int:
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
