"""Open questions with a short answer: exact match after `normalise`, by question type where the rows name one.

A prediction (or what of it stands in <answer> tags or a \\boxed{}) is an answer when it has one to MAX_WORDS words; anything
else is unparsed, hence wrong. Beside each figure stands what somebody scores who never looks or listens and always gives the
most frequent answer of the same rows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from eval.benchmarks.base import Benchmark, Row, majority, normalise, share
from eval.benchmarks.tags import marked

MAX_WORDS = 6


class ShortAnswer(Benchmark):
    def parse(self, text: str) -> str | None:
        answer = normalise(marked(text))
        return answer if 1 <= len(answer.split()) <= MAX_WORDS else None

    def points(self, row: Row) -> tuple[float, float]:
        return float(self.reading(row) == normalise(row.answer)), 1.0

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"baselines": {"majority_answer": share(majority(normalise(row.answer) for row in rows), len(rows))}}


class TypedShortAnswer(ShortAnswer):
    """Rows carry meta["question_type"]: what it is about and what it asks, as in ["Audio-Visual", "Counting"]."""

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
        for row in rows:
            found[question_type(row)].append(row)
        by_type = dict(sorted(found.items()))
        types = {" ".join(name): self._figures([members]) for name, members in by_type.items()}
        scenes: dict[str, list[list[Row]]] = defaultdict(list)
        for name, members in by_type.items():
            scenes[name[0]].append(members)
        whole = self._figures(list(by_type.values()))
        return {
            "types": types,
            "scenes": {name: self._figures(groups) for name, groups in scenes.items()},
            "baselines": super().details(rows)["baselines"] | {"majority_answer_by_type": whole["majority"]},
        }

    def _figures(self, groups: list[list[Row]]) -> dict[str, Any]:
        """Accuracy over all groups together, and that of giving each group its own most frequent answer."""
        rows = [row for group in groups for row in group]
        blind = sum(majority(normalise(row.answer) for row in group) for group in groups)
        return {
            "rows": len(rows),
            "accuracy": share(sum(self.points(row)[0] for row in rows), len(rows)),
            "majority": share(blind, len(rows)),
        }


def question_type(row: Row) -> tuple[str, ...]:
    """The row's type; rows without one (or that could not be read) stand together."""
    named = row.meta.get("question_type") or row.meta.get("type") or ["unknown"]
    if isinstance(named, str) and named.startswith("["):
        try:
            named = json.loads(named)  # as MUSIC-AVQA's own files have it
        except ValueError:
            return (named,)
    return tuple(str(part) for part in named) if isinstance(named, list) and named else (str(named),)
