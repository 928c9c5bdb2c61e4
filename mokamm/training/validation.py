"""Validation while training: the mean loss over answer tokens, and the share of samples whose whole answer is right.

"Right" is under teacher forcing: at every answer token the most probable token is the true one. That is greedy
decoding's answer exactly when it is the true answer, at the cost of one forward instead of a generation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from data.schema import IGNORED
from mokamm.training.engine import Engine
from mokamm.training.launch import Ranks
from mokamm.training.stream import ValidationBatches


@torch.no_grad()
def validate(engine: Engine, loader: Iterable[Any], rows: ValidationBatches, ranks: Ranks) -> dict[str, float]:
    """{"loss", "accuracy", "samples"} over all ranks; leaves the engine in training mode."""
    engine.train(False)
    loss = tokens = right = samples = 0.0
    for i, batch in enumerate(loader):
        labels = batch["labels"]
        labels[rows.real(i) :] = IGNORED  # stand-ins
        outputs = engine(batch)
        loss += float(outputs["loss_sum"])
        tokens += int((labels[:, 1:] != IGNORED).sum())
        wrong = exactly_wrong(outputs["logits"], labels)
        right += rows.real(i) - int(wrong[: rows.real(i)].sum())
        samples += rows.real(i)
    engine.train(True)
    loss, tokens, right, samples = ranks.sum([loss, tokens, right, samples])
    return {"loss": loss / max(tokens, 1.0), "accuracy": right / max(samples, 1.0), "samples": samples}


def exactly_wrong(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """(B,) bool on the CPU: samples with at least one answer token that is not the most probable one."""
    targets = labels_BT[:, 1:]
    row, column = (targets != IGNORED).nonzero(as_tuple=True)
    best = logits_BTV[row.to(logits_BTV.device), column.to(logits_BTV.device)].argmax(-1).cpu()
    wrong = torch.zeros(len(targets), dtype=torch.int64)
    return wrong.index_add(0, row, (best != targets[row, column]).long()) > 0
