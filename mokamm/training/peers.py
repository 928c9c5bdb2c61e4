"""What a rank tells its user when another rank does not answer any more.

    collective --RuntimeError of the backend--> PeerLost: who is missing, as far as known | the newest whole checkpoint
                                                          | what to type

A process that ended closes its connections, and gloo names their address at once; a host that lost its power is silent,
and the collective gives up after `training.ddp_timeout` seconds. Then every other host is knocked at: one that answers,
even by refusing the connection, is up. With NCCL it is torch's watchdog that ends a process whose collective does not
come back (the same timeout); its own report is then all there is.
"""

from __future__ import annotations

import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data.schema import UserError
from mokamm.training import checkpoint

if TYPE_CHECKING:
    from mokamm.config_sections import TrainingConfig
    from mokamm.training.launch import Ranks


class PeerLost(UserError):
    """Another rank has gone away; nothing is wrong with the configuration, and the same command goes on."""

    exit_code = 75  # sysexits' EX_TEMPFAIL: a scheduler may try again


@contextmanager
def told(ranks: Ranks, message: Callable[[str], str]) -> Iterator[None]:
    """Turns what a backend raises when a peer is gone into PeerLost; anything else passes. message: of what it said."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not is_loss(error):
            raise
        raise PeerLost(message(str(error))) from error


def is_loss(error: RuntimeError) -> bool:
    """Whether the error comes from the connection to other ranks. gloo raises plain RuntimeErrors."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def message(ranks: Ranks, training: TrainingConfig, said: str) -> str:
    whole = checkpoint.find(Path(training.output_dir), "auto")
    again = "start the same command again on every host" if ranks.hosts_differ else "start the same command again"
    resumes = training.resume_from_checkpoint == "auto"
    if whole is None:
        ahead = f"there is no whole checkpoint in {training.output_dir} yet; {again} to begin anew"
    elif resumes:
        ahead = f"{whole} is whole; {again}, and it goes on from there"
    else:
        ahead = f"{whole} is whole; {again} with training.resume_from_checkpoint=auto, and it goes on from there"
    words = [word for word in sys.argv if not word.startswith("--local_rank")]  # a launcher adds it
    return (
        f"{missing(ranks, training.ddp_timeout, said)}\n  {ahead}:\n"
        f"    ... {shlex.join(words)}\n  ({ranks.backend} said: {said.strip().splitlines()[0][:200]})"
    )


def missing(ranks: Ranks, timeout: int, said: str) -> str:
    """Who does not answer, as far as this rank can tell."""
    others = [rank for rank in range(ranks.world) if rank != ranks.rank]
    found = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", said)
    closed = [rank for rank in others if found and ranks.hosts[rank][1] == found[1]]
    if found and "imed out" not in said:
        gone = closed or others
        return (
            f"{'one of ' if len(gone) > 1 else ''}{named(ranks, gone)} ended; what it ended with stands in its own log"
        )
    up = {address: answers(address) for _, address in {ranks.hosts[rank] for rank in others}}
    silent = [rank for rank in others if not up[ranks.hosts[rank][1]]]
    if silent:
        return f"no answer from {named(ranks, silent)} for {timeout} s (training.ddp_timeout), nor from the host itself"
    which = f"{'one of ' if len(others) > 1 else ''}{named(ranks, others)}"
    return f"no answer from {which} for {timeout} s (training.ddp_timeout), though the host is up"


def named(ranks: Ranks, which: list[int]) -> str:
    return ", ".join(f"rank {rank} on {ranks.hosts[rank][0]} ({ranks.hosts[rank][1]})" for rank in which)


def answers(address: str) -> bool:
    """Whether a host is up: it takes a connection or refuses it."""
    try:
        socket.create_connection((address, 22), timeout=3).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
