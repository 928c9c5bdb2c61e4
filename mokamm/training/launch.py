"""Where this process stands among its peers: rank, device, threads, process group.

One file serves `deepspeed`, `accelerate launch`, `torchrun` and plain `python`. A launcher sets RANK and its kin;
plain python with a DeepSpeed configuration sets them itself, for one process. On CPU the backend is gloo, and
DeepSpeed's shared-memory operator is switched off: it would need a compiler, and the losses are bit-identical without
it.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data.schema import UserError

if TYPE_CHECKING:
    import torch

    from mokamm.config_sections import TrainingConfig

T = TypeVar("T")
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
    hosts: tuple[tuple[str, str], ...] = ()  # (name, address) by rank, where there are several

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def backend(self) -> str:
        return "gloo" if self.device.type == "cpu" else "nccl"

    @property
    def hosts_differ(self) -> bool:
        return len(set(self.hosts)) > 1

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

    def shared(self, ask: Callable[[], T]) -> T:
        """What `ask` answers on rank 0, on every rank; the others do not ask."""
        import torch.distributed as dist

        answer: list[Any] = [ask() if self.main else None]
        if self.grouped and self.world > 1:
            dist.broadcast_object_list(answer, src=0, device=self.device)
        return answer[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; pickled, so for what happens seldom."""
        import torch.distributed as dist

        if not self.grouped or self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def rank_here() -> int:
    """By the launcher's word, before a group is joined."""
    return int(os.environ.get("RANK", "0"))


def world_here() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(training: TrainingConfig, backend: str | None = None) -> Ranks:
    """Choose the device, fix the number of threads, join the process group, seed the generators.

    backend: of a group that DeepSpeed has no part in; None: nccl on GPUs, else gloo.
    """
    import torch

    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, however many it is asked for (it leaves that to mpirun); "
            "use `accelerate launch --multi_gpu --num_processes N`, which also runs on CPUs, torchrun or deepspeed"
        )
    cpu = not torch.cuda.is_available() if training.use_cpu is None else training.use_cpu
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not launched and training.deepspeed:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **_own_port())
    elif launched and world_here() == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun itself listens there
        os.environ.update(_own_port())  # `deepspeed` gives all its runs on a host the same
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
    grouped = _joined(training, cpu, launched, backend)
    seed_everything(training.seed)
    ranks = Ranks(rank_here(), local_rank, world_here(), device, grouped)
    return replace(ranks, hosts=tuple(ranks.gather(_own_host()))) if grouped else ranks


def stop(ranks: Ranks) -> None:
    """Leave the process group; a ZeRO-3 run that does not ends with a strange exit code."""
    if ranks.grouped:
        import torch.distributed as dist

        dist.destroy_process_group()


def leave(code: int = 0) -> None:
    """End the process at once where there are several: peers may wait for it, and threads of gloo now and then abort in
    the interpreter's end."""
    if world_here() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def check_shared(folder: Path, ranks: Ranks, named: str = "training.output_dir") -> None:
    """UserError, on every rank, where the run folder of some rank is not that of rank 0; every rank must call it.

    named: what the message calls the folder.
    """
    if ranks.world == 1 or not ranks.grouped:
        return
    mark = folder / ranks.shared(lambda: f".seen-by-all-{uuid.uuid4().hex}")
    if ranks.main:
        mark.touch()
    ranks.barrier()
    blind = 0.0 if _appears(mark) else 1.0
    found = ranks.sum([blind if rank == ranks.rank else 0.0 for rank in range(ranks.world)])
    if ranks.main:
        mark.unlink()
    hosts = sorted({ranks.hosts[rank][0] for rank, count in enumerate(found) if count})
    if hosts:
        raise UserError(
            f"{named}: {folder} on {', '.join(hosts)} is not the folder that rank 0 writes to "
            f"on {ranks.hosts[0][0]}; all hosts must share it (and data.world, data.cache): name a path on common storage"
        )


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes soon: network file systems tell others late."""
    until = time.monotonic() + 10.0
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def limit_waiting(seconds: int) -> None:
    """Give every process group the timeout: DeepSpeed makes groups of its own, which wait for torch's 30 minutes."""
    from torch.distributed import distributed_c10d

    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def free_memory() -> None:
    """What nothing names any more goes, and a GPU's share of it to whoever asks next, another process too."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def plain_environment() -> dict[str, str]:
    """This process's environment without the launcher's variables, for a subprocess of its own."""
    own = {*LAUNCHER_VARIABLES, "DS_ACCELERATOR", *(["OMP_NUM_THREADS"] if _threads_are_torchruns() else [])}
    return {k: v for k, v in os.environ.items() if k not in own}


def run_program(command: list[str], folder: Path | None = None) -> int:
    """Run a program without the launcher's variables; its exit code. What stops this process meanwhile stops it first."""
    if threading.current_thread() is not threading.main_thread():  # the main thread alone may handle signals
        return subprocess.run(command, cwd=folder, env=plain_environment(), check=False).returncode
    with subprocess.Popen(command, cwd=folder, env=plain_environment()) as program:
        stopped = False

        def stop(*_: Any) -> None:
            nonlocal stopped
            stopped = True
            program.terminate()

        before = signal.signal(signal.SIGTERM, stop)
        try:
            code = program.wait()
        except KeyboardInterrupt:
            program.terminate()  # a terminal has told it, too; kill(1) has not
            program.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if stopped:
        signal.raise_signal(signal.SIGTERM)
    return code


def _own_port() -> dict[str, str]:
    """Where the only rank of a group meets itself: a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def _threads() -> None:
    """All cores of this machine, shared by its processes; data workers give way (corpus.batches), so they are not counted.

    A user's OMP_NUM_THREADS is kept; torchrun's own 1 is not a user's.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ and not _threads_are_torchruns():
        return
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))


def _threads_are_torchruns() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"


def _own_host() -> tuple[str, str]:
    """This host's name, and its address as the other ranks see it: that from which rank 0 is reached. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
            return socket.gethostname(), probe.getsockname()[0]
        except OSError:
            return socket.gethostname(), "127.0.0.1"


def _joined(training: TrainingConfig, cpu: bool, launched: bool, backend: str | None) -> bool:
    """`_join`, with one message where the other ranks do not come."""
    import torch.distributed as dist

    try:
        return _join(training, cpu, launched, backend)
    except dist.DistError as error:
        here = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {here['MASTER_PORT']}, at which the ranks meet, is taken on this host, perhaps by another run; give "
                "this one its own: --master_port N behind `deepspeed` or torchrun, --main_process_port N behind "
                "accelerate launch"
            ) from error
        raise UserError(
            f"rank {here['RANK']} of {here['WORLD_SIZE']} did not meet all the others within {training.ddp_timeout} s "
            f"(training.ddp_timeout): {str(error).splitlines()[0][:200]}. Start the command on every host, each with "
            f"its own node rank; {here['MASTER_ADDR']}:{here['MASTER_PORT']} (of rank 0) must be reachable, and where "
            "a host has several networks, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME name the one to use"
        ) from error


def _join(training: TrainingConfig, cpu: bool, launched: bool, backend: str | None) -> bool:
    backend, timeout = backend or ("gloo" if cpu else "nccl"), timedelta(seconds=training.ddp_timeout)
    if training.deepspeed:
        import logging

        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if cpu:  # set, not probed: asking DeepSpeed which operators this machine could compile starts compilers
            vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        return True
    if launched:
        import torch.distributed as dist

        dist.init_process_group(backend, timeout=timeout)
        return True
    return False
