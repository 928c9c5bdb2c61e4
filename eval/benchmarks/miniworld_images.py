"""Yes/no questions about objects in pictures of the miniature world, as in POPE (Li et al. 2023).

File: SPLIT/images.jsonl (messages rows); media: SPLIT/images/*.png. A prediction says yes or no when its first word
does, or when exactly one of the two stands anywhere in it; otherwise it is unparsed, hence wrong. Precision, recall and
F1 are those of "yes"; the yes-ratio is over all rows (the truth is balanced: 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.benchmarks.base import Benchmark, Row, majority, normalise, share


class MiniworldImages(Benchmark):
    name = "miniworld_images"
    source = "messages"

    def parse(self, text: str) -> str | None:
        words = normalise(text).split()
        said = {"yes", "no"} & set(words)
        if words and words[0] in said:
            return words[0]
        return said.pop() if len(said) == 1 else None

    def _pair(self, row: Row) -> tuple[str | None, str | None]:
        """The true and the predicted answer."""
        return self.parse(row.answer), self.parse(row.prediction) if row.error is None else None

    def points(self, row: Row) -> tuple[float, float]:
        truth, answer = self._pair(row)
        return float(truth is not None and answer == truth), 1.0

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        pairs = [self._pair(row) for row in rows]
        hits = pairs.count(("yes", "yes"))
        said_yes = sum(answer == "yes" for _, answer in pairs)
        are_yes = sum(truth == "yes" for truth, _ in pairs)
        precision, recall = share(hits, said_yes), share(hits, are_yes)
        return {
            "precision": precision,
            "recall": recall,
            "f1": share(2 * precision * recall, precision + recall),
            "yes_ratio": share(said_yes, len(rows)),
            "baselines": {"majority_answer": share(majority(t for t, _ in pairs if t), len(rows))},
        }
