"""How much a data set has to teach, against how much an adapter can hold: both in bits, both only to an order.

    information <= answer tokens * nats / ln 2        capacity ~ 2 bits * trained parameters

Only answer tokens bear loss, so only they are learned. What a token teaches is at most its loss when first seen; nobody
knows that before training, so one nat is assumed, which is above what an instruction-tuned LLM mostly has (a run's own
figure is the loss of its first epoch, in metrics.jsonl). The capacity is that of "LoRA Without Regret" (2025). Rows that
are repeated teach nothing new and are counted once.

Cost: the tokenizer over every answer; of a source with more than SAMPLE rows over that many, evenly spread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from data.dataset import epoch_rows
from data.schema import BadSample, UserError
from data.sources import Rows, open_source
from mokamm.config import RunConfig
from mokamm.processor import Processor

BITS_PER_PARAMETER = 2.0
NATS_PER_TOKEN = 1.0
SAMPLE = 2000


@dataclass
class Answers:
    """The training rows of a configuration. tokens None: not counted."""

    rows: int = 0  # of an epoch, with weights
    distinct: int = 0
    tokens: float | None = None
    read: int = 0  # rows that were really tokenised
    bad: int = 0  # of those, rows that cannot be used
    exact: bool = True  # no source was sampled
    problems: list[str] = field(default_factory=list)

    def bits(self, nats: float = NATS_PER_TOKEN) -> float:
        return (self.tokens or 0.0) * nats / math.log(2)


def rank_for(bits: float, parameters: int, rank: int) -> int:
    """The smallest rank that can hold so many bits, where an adapter of `rank` has so many parameters."""
    return max(1, math.ceil(bits / (BITS_PER_PARAMETER * parameters / rank)))


def count_answers(config: RunConfig, processor: Processor | None) -> Answers:
    """The rows and answer tokens of data.train; what cannot be counted is named in `problems`."""
    found, parts = Answers(), []
    for i, entry in enumerate(config.data.train):
        path, media_dir = config.locate(entry)
        try:
            rows = open_source(entry.source, path, limit=entry.limit, media_dir=media_dir, **entry.options)
            parts.append((rows, entry.weight))
        except UserError as error:
            found.problems.append(f"data.train.{i}: {error}")
    if found.problems:
        return found
    found.rows = sum(epoch_rows(len(rows), weight) for rows, weight in parts)
    if not found.rows:
        found.problems.append("data.train: no rows are left; raise the weights or limits of the sources")
    if processor is None or found.problems:
        return found
    found.tokens = 0.0
    training = config.training  # a fraction of a source is another one in each epoch
    epochs = max(1.0, training.num_train_epochs) if training.max_steps < 0 else 1.0
    for rows, weight in parts:
        _count(found, rows, min(weight * epochs, 1.0), processor)
    return found


def _count(found: Answers, rows: Rows, share: float, processor: Processor) -> None:
    """Add one source, of which that share of rows is used."""
    count = len(rows)
    chosen = range(count) if count <= SAMPLE else [i * count // SAMPLE for i in range(SAMPLE)]
    tokens = good = 0
    for index in chosen:
        try:
            tokens += processor.answer_length(rows[index])
            good += 1
        except BadSample:
            found.bad += 1
    assert found.tokens is not None
    found.tokens += tokens / max(good, 1) * count * share
    found.distinct += round(count * share)
    found.read += len(chosen)
    found.exact = found.exact and len(chosen) == count and share == 1.0
