"""Steps that would spoil the weights: found before the update, which is then left out on every rank.

A step is bad where its loss or gradient norm is not finite, or (training.loss_spike) where its loss is so many times the
mean of the last steps. training.on_nan says what follows: `stop` ends the run, `skip` goes on, as if the step had had a
rate of 0. Both name the rows.

    loss of a rank not finite, or a spike --marked--> NaN gradients --any reduction--> the norm of all ranks not finite
                                                                                       --> every engine makes no update

So one rank's trouble reaches all of them by way of the gradients, and nothing is sent for it. A spike is known only from
the loss of all ranks: one number more a step, where it is asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.schema import IGNORED
from mokamm.config_sections import TrainingConfig
from mokamm.training.checkpoint import TrainerState, newest_first
from mokamm.training.launch import Ranks
from mokamm.training.stopping import BadStep
from mokamm.training.watch import named

MEMORY = 50  # steps whose mean loss a spike is measured by
FEWEST = 10  # no step is a spike before so many
LEAST = 1e-3  # mean loss: of rows learned by heart any other loss would be a spike
PATIENCE = 10  # bad steps in a row end the run under `skip` too: it is not the rows


def marked(loss: Tensor, usable: bool = True) -> Tensor:
    """The loss, bit for bit; NaN where it is not finite or the step is not usable, and then so are its gradients."""
    return loss * (loss.detach() * 0 + 1) if usable else loss * float("nan")


class BadSteps:
    """What is known of past losses, and what is done about a step that cannot be used."""

    def __init__(self, training: TrainingConfig, state: TrainerState, ranks: Ranks) -> None:
        self.training, self.state, self.ranks = training, state, ranks
        self.loss: float | None = None  # of the step and of all ranks, where loss_spike needs it
        self.spike = ""

    def usable(self, losses: list[Tensor], answers: float) -> bool:
        """False for a spike; before the step's last backward pass. losses: this rank's sums; answers: of all ranks."""
        self.spike = ""
        if self.training.loss_spike is None:
            return True
        (loss,) = self.ranks.sum([float(torch.stack(losses).double().sum())])
        self.loss, recent = loss / max(answers, 1.0), self.state.recent
        ratio = self.loss / max(sum(recent) / len(recent), LEAST) if len(recent) >= FEWEST else 0.0
        if ratio > self.training.loss_spike:
            self.spike = f"a loss of {self.loss:.4g}, {ratio:.3g} times the mean of the last {len(recent)} steps"
        return not self.spike

    def passed(self) -> None:
        """The step was good and its update was made."""
        self.state.bad_in_a_row = 0
        if self.loss is not None:
            self.state.recent = [*self.state.recent, self.loss][-MEMORY:]

    def record(self, micro_batches: list[Any], losses: list[Tensor]) -> dict[str, Any]:
        """Why the step's update was not made, and its rows, the worst micro batch first; every rank must call it."""
        self.state.bad_in_a_row += 1
        own = [told(batch, float(loss)) for batch, loss in zip(micro_batches, losses, strict=True)]
        entries = [entry for rank in self.ranks.gather(own) for entry in rank]
        worst = sorted(entries, key=lambda e: -e["loss"] if math.isfinite(e["loss"]) else -math.inf)
        finite = all(math.isfinite(entry["loss"]) for entry in entries)
        reason = (self.spike or "a gradient that is not finite") if finite else "a loss that is not finite"
        for entry in worst:
            entry["loss"] = entry["loss"] if math.isfinite(entry["loss"]) else str(entry["loss"])  # JSON has no NaN
        return {"reason": reason, "micro_batches": worst}

    def check(self, record: dict[str, Any]) -> None:
        """Raise BadStep where the run may not go on without that update."""
        number = self.state.bad_in_a_row
        if self.training.on_nan == "skip" and number < PATIENCE:
            return
        again = f", bad step number {number} in a row" if number > 1 else ""
        raise BadStep(
            f"step {record['step']}: {record['reason']}{again}; the weights are as before it.\n{self._advice(record)}"
        )

    def _advice(self, record: dict[str, Any]) -> str:
        run = Path(self.training.output_dir)
        saved = next(iter(newest_first(run)), None)
        lines = [
            f"Its rows, the worst micro batch first (all of them are in {run}/metrics.jsonl):",
            *(f"  {line}" for line in named(record["micro_batches"])),
            "What to try:",
            "  - look at these rows and their media; mend them, or take them out",
        ]
        if self.training.on_nan == "stop":
            lines.append("  - training.on_nan=skip leaves such steps out (and names their rows)")
        lines += [
            "  - where grad_norm in metrics.jsonl had grown before: a lower training.learning_rate, more "
            "training.warmup_steps, training.max_grad_norm=1.0",
            f"{saved} is untouched, and the same command goes on from it." if saved else "Nothing was saved before it.",
        ]
        return "\n".join(lines)


def told(batch: Any, loss_sum: float) -> dict[str, Any]:
    """A micro batch for a record: its loss per answer token, and which rows it holds."""
    answers = int((batch["labels"][:, 1:] != IGNORED).sum())
    rows = [{"source": s.source, "row": s.row, "id": s.id} for s in batch["samples"]]
    return {"loss": loss_sum / max(answers, 1), "rows": rows}
