"""The loop against a plain one: every sample alone in float64, torch's AdamW, transformers' own scheduler, one clip.

Nothing of the engine, the collator's padding, the schedule or the sums behind a log line is used in it.
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from data.collate import collate
from data.schema import IGNORED
from mokamm.training.stream import MicroBatches, plan
from mokamm.training.watch import read_metrics

STEPS, BATCH, ACCUMULATION, EVERY, WARMUP = 11, 2, 3, 4, 3
SETTINGS = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION,
    "logging_steps": EVERY, "eval_steps": STEPS, "save_steps": 5, "lr_scheduler_type": "cosine", "warmup_steps": WARMUP,
    "max_grad_norm": 0.3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-4, "seed": 3,
}  # fmt: skip


def plain_steps(model, dataset, training) -> list[dict[str, float]]:
    """Train `model` by the book; the figures of every step. Each micro batch is padded to its longest row."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n.startswith("projectors.") == own and (p.ndim > 1) == matrix],
         "lr": training.projector_learning_rate if own else training.learning_rate,
         "weight_decay": training.weight_decay if matrix else 0.0}
        for own in (False, True) for matrix in (True, False)
    ]  # fmt: skip
    betas, eps = (training.adam_beta1, training.adam_beta2), training.adam_epsilon
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=betas, eps=eps)
    scheduler = get_scheduler(training.lr_scheduler_type, optimizer, WARMUP, STEPS)
    shape, found = plan(len(dataset), BATCH, ACCUMULATION, 1, 1.0, STEPS), []
    micro_batches = [[dataset[i] for i in rows] for rows in MicroBatches(shape, training.seed, 0)]
    for step in range(STEPS):
        window = micro_batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]
        losses, answers = [], 0
        for example in (row for batch in window for row in batch):
            predicted = model(collate([example], 0))["logits"][0, :-1].log_softmax(-1)
            targets = example.labels[1:]
            where = (targets != IGNORED).nonzero()[:, 0]
            losses.append(-predicted[where, targets[where]].sum())
            answers += len(where)
        optimizer.zero_grad()
        (sum(losses) / answers).backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for _, p in trained))
        for _, p in trained:
            p.grad *= min(1.0, training.max_grad_norm / norm)
        lengths = [[len(row.input_ids) for row in batch] for batch in window]
        found.append(
            {
                "loss_sum": float(sum(losses).detach()), "answers": answers, "norm": norm, "rate": scheduler.get_last_lr(),
                "tokens": sum(map(sum, lengths)), "places": sum(len(batch) * max(batch) for batch in lengths),
            }
        )  # fmt: skip
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("stops", [(), (3, 7)], ids=["whole", "resumed"])
def test_weights_and_log_lines_are_those_of_a_plain_loop(toy, tmp_path, stops):
    for stop in (*stops, None):
        trained, _ = toy.run(tmp_path, toy.alone(), stop_after=stop, **SETTINGS)
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "train"]

    training = toy.config(tmp_path, **SETTINGS).training
    model, dataset = toy.build(seed=training.seed).double(), toy.corpus(tmp_path).train
    steps = plain_steps(model, dataset, training)
    expected = dict(model.named_parameters())
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.double(), expected[name], rtol=0, atol=2e-6), name
    norms = [step["norm"] for step in steps]
    assert min(norms) < training.max_grad_norm < max(norms)  # some steps are clipped, some are not

    assert [record["step"] for record in records] == [4, 8, 11]
    for record in records:
        window = steps[(record["step"] - 1) // EVERY * EVERY : record["step"]]
        total = {key: sum(step[key] for step in window) for key in ("loss_sum", "answers", "tokens", "places")}
        assert record["loss"] == pytest.approx(total["loss_sum"] / total["answers"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(window[-1]["norm"], rel=1e-5)
        rates = {"adapter": max(window[-1]["rate"]), "projector": min(window[-1]["rate"])}
        assert record["learning_rate"] == pytest.approx(rates)
        assert record["padding_share"] == pytest.approx(1 - total["tokens"] / total["places"], abs=1e-4)
        most, least = (total["tokens"] / (record["seconds"] + rounded) for rounded in (-5e-4, 5e-4))
        assert least - 0.05 <= record["tokens_per_second"] <= most + 0.05  # rounded, too
        assert record["epoch"] == pytest.approx(record["step"] * BATCH * ACCUMULATION / len(dataset), abs=1e-4)
