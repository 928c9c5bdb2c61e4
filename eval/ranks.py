"""Several processes that answer one benchmark: under `deepspeed`, `torchrun` or `accelerate launch`, or one alone.

The ranks share the run folder and meet three times a command at most for each benchmark: all rows are read, all answers
are on disk, done. In between each answers its own batches and waits for nobody, so that a rank without rows has nothing
to hang on. The group is gloo's on GPUs too: nothing of weight passes through it, and a rank that ended is noticed at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from data.schema import UserError

if TYPE_CHECKING:
    from mokamm.config import RunConfig
    from mokamm.training.launch import Ranks

PATIENCE = 6 * 3600  # seconds that a rank which has answered its share waits for the others


def join(config: RunConfig) -> Ranks:
    """This process among its peers, with the device of its local rank."""
    from mokamm.build import choose_device
    from mokamm.training import launch

    if launch.world_here() == 1:
        return launch.Ranks(0, 0, 1, choose_device(None), grouped=False)
    changes: dict[str, Any] = {"deepspeed": None, "use_cpu": None, "ddp_timeout": PATIENCE}
    return launch.start(config.training.model_copy(update=changes), backend="gloo")


def check_alike(ranks: Ranks, digests: dict[str, str]) -> None:
    """Raise UserError where ranks would answer different rows, or with different weights (hosts with files of their own)."""
    found = ranks.gather(digests)
    for rank, other in enumerate(found):
        if other != found[0]:  # on every rank, so that none waits for another
            changed = ", ".join(name for name in found[0] if other.get(name) != found[0][name])
            raise UserError(
                f"rank {rank} does not see what rank 0 sees of: {changed}. All hosts must have the same run, "
                "annotations and versions: use a shared folder, or copy them"
            )


def told(ranks: Ranks) -> AbstractContextManager[None]:
    """Turns what gloo raises when a peer is gone into one message; anything else passes."""
    from mokamm.training import peers

    again = "start the same command again, with any number of processes, and it goes on from them"
    return peers.told(
        ranks, lambda said: f"{peers.missing(ranks, PATIENCE, said)}\n  all answers so far are kept; {again}"
    )
