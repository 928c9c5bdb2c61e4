"""Audio-visual events, as in AVE (Tian et al. 2018): which event is seen and heard together, and when?

A clip of ten seconds has ten labels: label k tells what happens in [k, k+1), an event's category or background. An
event from `start` to `end` seconds therefore covers the labels start .. end-1; with fractions, those whose middle lies
inside. The score is the share of right labels. A prediction that cannot be parsed has ten wrong labels, background
included.

Beside it: the share of right categories (event_accuracy), of wholly right rows, the mean overlap (intersection over
union) of the intervals, and answers that need no sense of time (baselines): for the whole clip the predicted category,
the true category, and the most frequent category.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from data.sources.ave import parse_event
from eval.benchmarks.base import Benchmark, Row, normalise, share

SECONDS = 10
MAX_LETTERS = 300  # a longer text is no answer of the form asked for
BACKGROUND = ""


class Event(NamedTuple):
    """A category and its interval in seconds; `more`: further intervals of the same event."""

    category: str
    start: float
    end: float
    more: tuple[tuple[float, float], ...] = ()

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """Without empty ones, in order, those that touch or overlap made one."""
        joined: list[tuple[float, float]] = []
        for start, end in sorted(i for i in ((self.start, self.end), *self.more) if i[0] < i[1]):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return joined


def labels(event: Event) -> list[str]:
    """One label a second, by the middle of the second."""
    intervals = event.intervals
    inside = [any(start <= k + 0.5 < end for start, end in intervals) for k in range(SECONDS)]
    return [event.category if heard else BACKGROUND for heard in inside]


def overlap(one: Event, other: Event) -> float:
    """Intersection over union of the intervals, categories aside; 0 where either is empty."""
    pairs = [(a, b) for a in one.intervals for b in other.intervals]
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in pairs)
    union = sum(end - start for event in (one, other) for start, end in event.intervals) - both
    return share(both, union)


class Events(Benchmark):
    """Answers in the form of data.sources.ave.format_event."""

    source = "ave"
    measure = "accuracy of labels per second"
    separated_by = ("media",)

    def parse(self, text: str) -> Event | None:
        found = parse_event(text.strip()) if len(text) <= MAX_LETTERS else None
        if found is None or not normalise(found[0]):
            return None
        return Event(normalise(found[0]), found[1], found[2])

    def true_event(self, row: Row) -> Event | None:
        return self.parse(row.answer)

    def points(self, row: Row) -> tuple[float, float]:
        truth, event = self.true_event(row), self.reading(row)
        if truth is None or event is None:
            return 0.0, float(SECONDS)
        return float(sum(a == b for a, b in zip(labels(event), labels(truth), strict=True))), float(SECONDS)

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        pairs = [(self.true_event(row), self.reading(row)) for row in rows]
        known = [(truth, event) for truth, event in pairs if truth and event]
        truths = [truth for truth, _ in pairs if truth]
        common = Counter(truth.category for truth in truths).most_common(1)[0][0] if truths else BACKGROUND
        inside = [(truth.category, sum(label != BACKGROUND for label in labels(truth))) for truth in truths]
        right = [sum(label != BACKGROUND for label in labels(t)) for t, event in known if t.category == event.category]
        count = len(rows)
        return {
            "event_accuracy": share(sum(truth.category == event.category for truth, event in known), count),
            "exact": share(sum(labels(truth) == labels(event) for truth, event in known), count),
            "mean_iou": share(sum(overlap(truth, event) for truth, event in known), count),
            "baselines": {
                "predicted_category_whole_clip": share(sum(right), SECONDS * count),
                "true_category_whole_clip": share(sum(n for _, n in inside), SECONDS * count),
                "majority_category_whole_clip": share(sum(n for name, n in inside if name == common), SECONDS * count),
            },
        }
