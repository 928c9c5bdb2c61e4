"""From the sources that a configuration names to data sets and loaders of batches.

    data.train --open_parts--> rows, each with its processor --MultimodalDataset--> examples --batches--> DataLoader

Cost: each annotation file is indexed once, in the main process; workers decode, tokenise and join.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader

from data.collate import collate, consolidated
from data.dataset import MultimodalDataset, Part
from data.ledger import Ledger
from data.schema import IGNORED, BadSample, Batch, Example, UserError
from data.sources import open_source
from mokamm.build import media_loader
from mokamm.config import RunConfig
from mokamm.config_sections import SourceConfig
from mokamm.training.stopping import ignore_signals

Join = Callable[[Sequence[Example], int], Batch]


class HeldOut(MultimodalDataset):
    """Validation rows: the substitute of one that cannot be used keeps its place in the batch, without an answer.

    It would otherwise be counted as the row that it is not.
    """

    key = "data.validation"

    def __getitem__(self, index: int) -> Example:
        try:
            return self._load(index)
        except BadSample:
            stand_in = super().__getitem__(index)
            return replace(stand_in, labels=torch.full_like(stand_in.labels, IGNORED))


class Corpus(NamedTuple):
    train: MultimodalDataset
    validation: MultimodalDataset | None
    pad_id: int
    ledger: Ledger


def build_corpus(config: RunConfig, processor: Any) -> Corpus:
    """Open every source. processor: mokamm.processor.Processor; each source gets a copy with its own media folder."""
    train, validation = open_parts(config, processor, "train"), open_parts(config, processor, "validation")
    total = sum(len(part.rows) for part in (*train, *validation))
    ledger = Ledger(f"{config.training.output_dir}/bad_samples.jsonl", config.data.max_bad_fraction, total)
    seed = config.training.seed
    return Corpus(
        MultimodalDataset(train, processor, ledger, seed),
        HeldOut(validation, processor, ledger, seed) if validation else None,
        processor.pad_id,
        ledger,
    )


def open_parts(config: RunConfig, processor: Any, split: Literal["train", "validation"]) -> list[Part]:
    """The sources of data.train or data.validation, each with a name of its own and a loader of its media folder."""
    entries: list[SourceConfig] = getattr(config.data, split)
    prefix = "validation/" if split == "validation" else ""
    parts, seen = [], Counter[str]()
    for i, entry in enumerate(entries):
        path, media_dir = config.locate(entry)
        try:
            rows = open_source(entry.source, path, limit=entry.limit, media_dir=media_dir, **entry.options)
        except UserError as error:
            raise type(error)(f"data.{split}.{i}: {error}") from None
        name = prefix + (entry.name or path.stem)
        seen[name] += 1
        if seen[name] > 1 and not entry.name:
            name = f"{name}-{seen[name]}"
        parts.append(Part(rows, entry.weight, name, processor.with_loader(media_loader(media_dir, config.data))))
    return parts


def batches(
    dataset: MultimodalDataset, sampler: Iterable[list[int]], pad_id: int, workers: int, join: Join = collate
) -> DataLoader:
    """A loader whose workers decode, tokenise and make batches by `join(examples, pad_id)`.

    Its generator is its own: iterating does not touch the training's.
    """
    if workers:  # what atexit holds is not called in a process that multiprocessing has started (eval/compare.py)
        Finalize(None, _end_workers, exitpriority=0)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(_batch, join=join, pad_id=pad_id, in_worker=workers > 0),
        num_workers=workers,
        worker_init_fn=_give_way,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator().manual_seed(0),
    )


def _batch(examples: Sequence[Example], join: Join, pad_id: int, in_worker: bool) -> Batch:
    batch = join(examples, pad_id)
    return consolidated(batch) if in_worker else batch


def _give_way(worker: int) -> None:
    """Let the training have a core first where both want one: what is prefetched can wait, a step cannot."""
    os.nice(10)
    ignore_signals()


def _end_workers() -> None:
    """Those that an error has left behind: multiprocessing sends them SIGTERM, which they ignore, and waits for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would tell of their end as of an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
