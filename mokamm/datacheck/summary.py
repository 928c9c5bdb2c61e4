"""Findings to numbers, and numbers to what should be done next.

Two lists of integers a source are kept (prompt and answer tokens of usable rows), and a number for each medium.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.collate import first_fit
from data.dataset import Part
from data.ledger import allowed_bad, share_told
from data.order import epoch_order
from mokamm.config import RunConfig
from mokamm.datacheck.walk import Finding
from mokamm.training.stream import BLOCK

TROUBLES = {
    "row": "rows that cannot be read",
    "missing": "rows whose media are not there",
    "refused": "rows whose media paths may not be read (absolute, '..', links, URLs)",
    "broken": "rows whose media cannot be decoded",
    "limit": "rows whose media are too long or too large (windows of speech, data.limits)",
    "track": "rows whose media lack the pictures or the sound that the row wants of them",
    "too_long": "rows whose prompt does not fit into data.max_length",
    "cut": "rows whose answer is cut at data.max_length (they are used)",
}
USED = ("", "cut")  # with these a row is used all the same
EXAMPLES = 3  # reasons shown of each trouble
STEP = 64  # suggested lengths are multiples of it


@dataclass
class SourceSummary:
    """What was found in one source."""

    name: str
    rows: int
    weight: float
    checked: int = 0
    text_only: int = 0
    prompts: array = field(default_factory=lambda: array("I"))
    answers: array = field(default_factory=lambda: array("I"))
    media: Counter[str] = field(default_factory=Counter)
    media_tokens: Counter[str] = field(default_factory=Counter)
    troubles: Counter[str] = field(default_factory=Counter)

    def lengths(self) -> np.ndarray:
        """Tokens of every row that can be laid out, whatever data.max_length is."""
        return np.asarray(self.prompts, dtype=np.int64) + np.asarray(self.answers, dtype=np.int64)

    def usable(self) -> int:
        return self.checked - sum(n for name, n in self.troubles.items() if name not in USED)


class Summary:
    """`add` every finding, then ask for `result`."""

    def __init__(self, config: RunConfig, parts: Sequence[Part]) -> None:
        self.config = config
        self.sources = [SourceSummary(part.name, len(part.rows), part.weight) for part in parts]
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.feature_bytes: dict[str, dict[int, int]] = defaultdict(dict)

    def add(self, found: Finding) -> str:
        """Why the row cannot be used, as trouble and reason; '' where it can."""
        source = self.sources[found.part]
        source.checked += 1
        trouble, reason = found.trouble, found.reason
        if not trouble:
            source.prompts.append(found.prompt)
            source.answers.append(found.answer)
            source.text_only += not found.items
            for item in found.items:
                source.media[item.modality] += 1
                source.media_tokens[item.modality] += item.tokens
                self.feature_bytes[item.modality][item.name] = item.feature_bytes
            trouble, reason = self._length_trouble(found)
        if trouble:
            source.troubles[trouble] += 1
            if len(self.examples[trouble]) < EXAMPLES:
                self.examples[trouble].append(f"{source.name} row {found.row}: {reason}")
        return f"{trouble}: {reason}" if trouble not in USED else ""

    def _length_trouble(self, found: Finding) -> tuple[str, str]:
        """As mokamm/processor.py decides: a prompt must leave room for one token, an answer is cut."""
        limit = self.config.data.max_length
        sizes = f"{found.prompt} tokens of prompt and {found.answer} of answer, data.max_length is {limit}"
        if found.prompt > limit - 1:
            return "too_long", sizes
        return ("cut", sizes) if found.prompt + found.answer > limit else ("", "")

    def result(self) -> dict[str, Any]:
        """The one object that --json prints."""
        troubles: Counter[str] = sum((source.troubles for source in self.sources), Counter())
        lengths = self.lengths()
        rows = sum(source.rows for source in self.sources)
        checked = sum(source.checked for source in self.sources)
        usable = sum(source.usable() for source in self.sources)
        stop = would_stop(rows, checked, checked - usable, self.config.data.max_bad_fraction)
        return {
            "rows": rows,
            "checked": checked,
            "usable": usable,
            "would_stop": bool(stop),
            "max_length": self.config.data.max_length,
            "tokens": describe(lengths),
            "sources": {source.name: self._source(source) for source in self.sources},
            "troubles": {name: troubles[name] for name in TROUBLES},
            "examples": dict(self.examples),
            "padding": padding(self._training_lengths(), self.config.training.per_device_train_batch_size),
            "cache_gb": {name: round(sum(sizes.values()) / 1e9, 6) for name, sizes in self.feature_bytes.items()},
            "advice": stop + advice(self.config, troubles, lengths),
        }

    def lengths(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=np.int64), *(source.lengths() for source in self.sources)])

    def _training_lengths(self) -> np.ndarray:
        """Lengths of the training sources' rows that fit, as often as their weight says."""
        parts = [np.zeros(0, dtype=np.int64)]
        for source in self.sources[: len(self.config.data.train)]:
            lengths = np.minimum(source.lengths(), self.config.data.max_length)
            times = source.weight * len(lengths)
            parts.append(np.resize(lengths, round(times)) if len(lengths) else lengths)
        return np.concatenate(parts)

    def _source(self, source: SourceSummary) -> dict[str, Any]:
        media = {name: {"items": n, "tokens": source.media_tokens[name]} for name, n in source.media.items()}
        return {
            "rows": source.rows,
            "checked": source.checked,
            "usable": source.usable(),
            "weight": source.weight,
            "text_only": source.text_only,
            "media": media,
            "tokens": describe(source.lengths()),
            "troubles": dict(source.troubles),
        }


def describe(lengths: np.ndarray) -> dict[str, float]:
    """Mean and percentiles; empty for no rows."""
    if not len(lengths):
        return {}
    low, middle, high, higher, most = np.percentile(lengths, [0, 50, 95, 99, 100], method="inverted_cdf").tolist()
    return {"mean": round(float(lengths.mean()), 1), "min": low, "p50": middle, "p95": high, "p99": higher, "max": most}


def padding(lengths: np.ndarray, batch: int) -> dict[str, float]:
    """The share of a batch's tokens that is padding: rows as they come, rows of like length together, rows shared."""
    count, block = len(lengths) // batch * batch, BLOCK * batch
    if not count:
        return {}
    shares = {}
    shuffled = lengths[epoch_order(len(lengths), 0, 0)][:count]
    grouped = np.concatenate([np.sort(shuffled[first : first + block]) for first in range(0, count, block)])
    for name, rows in (("random", shuffled), ("group_by_length", grouped)):
        table = rows.reshape(-1, batch)
        shares[name] = round(1 - float(rows.sum() / (table.max(axis=1).sum() * batch)), 4)
    packed = sum(len(first_fit(row, max(row))) * max(row) for row in shuffled.reshape(-1, batch).tolist())
    return {**shares, "packing": round(1 - float(shuffled.sum() / packed), 4)}


def would_stop(rows: int, checked: int, bad: int, max_bad_fraction: float | None) -> list[str]:
    """What to say where a training would stop at its bad rows, if those that were not checked are as those that were."""
    if bad * rows <= allowed_bad(max_bad_fraction, rows) * checked:
        return []
    return [
        f"a training would stop: {bad} of {checked} rows ({bad / checked:.1%}) cannot be used, more than "
        f"data.max_bad_fraction = {share_told(max_bad_fraction)}"
    ]


def advice(config: RunConfig, troubles: Counter[str], lengths: np.ndarray) -> list[str]:
    """What to do next, the most pressing first."""
    data, said = config.data, []
    if troubles["missing"]:
        said.append(f"fetch the missing media, or correct data.media_dir (now {data.media_dir}) and the rows' paths")
    if troubles["refused"]:
        said.append(
            "media paths must lie in data.media_dir: take the front of absolute ones off by the source's "
            "options: {strip_prefix: FOLDER}, copy linked files there, or set data.allow_outside: true"
        )
    if troubles["broken"]:
        said.append("fetch the broken media again, or leave their rows out; bad_samples.jsonl names each")
    if troubles["limit"]:
        said.append(
            "raise the limit that bad_samples.jsonl names for each (`segments` or `seconds` of speech, data.limits), or "
            "make those media smaller"
        )
    if troubles["track"]:
        said.append(
            "use other files for media without the wanted track (bad_samples.jsonl names each), or leave them out"
        )
    if troubles["row"]:
        said.append("mend the rows that cannot be read; bad_samples.jsonl says where and why")
    if troubles["too_long"] or troubles["cut"]:
        fits = {share: _up(np.percentile(lengths, share, method="inverted_cdf")) for share in (99, 100)}
        said.append(
            f"data.max_length: {fits[100]} holds every row, {fits[99]} holds 99 % of them; fewer `segments` or "
            "projector tokens make rows shorter"
        )
    return said or ["nothing: every row can be used as it is"]


def _up(tokens: float) -> int:
    return int(-(-tokens // STEP) * STEP)
