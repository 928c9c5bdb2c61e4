"""Where this process stands among its peers: rank, device, threads, process group.

One file serves `deepspeed`, `accelerate launch`, `torchrun` and plain `python`. A launcher sets RANK and its kin;
plain python with a DeepSpeed configuration sets them itself, for one process. On CPU the backend is gloo, and
DeepSpeed's shared-memory operator is switched off: it would need a compiler, and the losses are bit-identical without
it.
"""

from __future__ import annotations

import os
import random
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.schema import UserError

if TYPE_CHECKING:
    import torch

    from mokamm.config import TrainingConfig

LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK",
    "CROSS_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "TORCHELASTIC_RUN_ID",
)  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world: int
    device: torch.device
    grouped: bool  # a process group exists

    @property
    def main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.grouped:
            import torch.distributed as dist

            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all ranks, in float64; one collective. Every rank must call it."""
        import torch
        import torch.distributed as dist

        if not self.grouped or self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; pickled, so for what happens seldom."""
        import torch.distributed as dist

        if not self.grouped or self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def start(training: TrainingConfig) -> Ranks:
    """Choose the device, fix the number of threads, join the process group, seed the generators."""
    import torch

    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    cpu = not torch.cuda.is_available() if training.use_cpu is None else training.use_cpu
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if training.deepspeed and not launched:
        _alone()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not cpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; start fewer "
            "processes, or set training.use_cpu=true"
        )
    device = torch.device("cpu") if cpu else torch.device("cuda", local_rank)
    if not cpu:
        torch.cuda.set_device(device)
    _threads()
    grouped = _join(training, cpu, launched)
    seed_everything(training.seed)
    return Ranks(rank, local_rank, world, device, grouped)


def stop(ranks: Ranks) -> None:
    """Leave the process group; a ZeRO-3 run that does not ends with a strange exit code."""
    if ranks.grouped:
        import torch.distributed as dist

        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def plain_environment() -> dict[str, str]:
    """This process's environment without the launcher's variables, for a subprocess of its own."""
    return {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and k != "DS_ACCELERATOR"}


def _alone() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _threads() -> None:
    """All cores of this machine, shared by its processes; data workers give way (corpus.batches), so they are not counted.

    A user's OMP_NUM_THREADS is kept; torchrun's own 1 is not a user's.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def _join(training: TrainingConfig, cpu: bool, launched: bool) -> bool:
    backend = "gloo" if cpu else "nccl"
    if training.deepspeed:
        import logging

        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if cpu:  # set, not probed: asking DeepSpeed which operators this machine could compile starts compilers
            vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        return True
    if launched:
        import torch.distributed as dist

        dist.init_process_group(backend)
        return True
    return False
