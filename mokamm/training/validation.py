"""Validation while training: the mean loss over answer tokens, and the share of samples whose whole answer is right.

"Right" is under teacher forcing: at every answer token the most probable token is the true one. That is greedy
decoding's answer exactly when it is the true answer, at the cost of one forward instead of a generation. A row that
cannot be used (corpus.HeldOut) comes without answer tokens: it has no loss, counts as wrong, and is reported as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from data.schema import IGNORED
from mokamm.training.engine import Engine
from mokamm.training.launch import Ranks
from mokamm.training.stream import ValidationBatches


@torch.no_grad()
def validate(
    engine: Engine,
    loader: Iterable[Any],
    rows: ValidationBatches,
    ranks: Ranks,
    heed: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{"loss", "accuracy", "samples", "missing"} over all ranks; leaves the engine in training mode.

    heed: called before each batch, on all ranks; it may raise.
    """
    engine.train(False)
    loss = tokens = right = samples = missing = 0.0
    for i, batch in enumerate(loader):
        heed()
        labels = batch["labels"]
        labels[rows.real(i) :] = IGNORED  # stand-ins
        outputs = engine(batch, answers_only=True)
        loss += float(outputs["loss_sum"])
        answers = (labels[:, 1:] != IGNORED).sum(1)
        tokens += int(answers.sum())
        right += int((~exactly_wrong(outputs["logits"], labels) & (answers > 0)).sum())
        missing += int((answers[: rows.real(i)] == 0).sum())
        samples += rows.real(i)
    engine.train(True)
    loss, tokens, right, samples, missing = ranks.sum([loss, tokens, right, samples, missing])
    accuracy = right / max(samples, 1.0)
    return {"loss": loss / max(tokens, 1.0), "accuracy": accuracy, "samples": samples, "missing": missing}


def exactly_wrong(logits_NV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """(B,) bool on the CPU: samples with at least one answer token that is not the most probable one, of all N."""
    targets = labels_BT[:, 1:]
    row, column = (targets != IGNORED).nonzero(as_tuple=True)
    best = logits_NV.argmax(-1).cpu()
    wrong = torch.zeros(len(targets), dtype=torch.int64)
    return wrong.index_add(0, row, (best != targets[row, column]).long()) > 0
