"""Audio-visual events of the miniature world, as in AVE: which event is seen and heard together, and when?

File: SPLIT/events.txt (lines NAME&VIDEO_ID&quality&start&end); media: SPLIT/videos/ID.mp4 and SPLIT/audio/ID.wav.

As published (Tian et al. 2018), a clip of ten seconds has ten labels: label k tells what happens in [k, k+1), an
event's category or background. An event from `start` to `end` seconds therefore covers the labels start .. end-1; with
fractions, those whose middle lies inside. The score is the share of right labels. A prediction that cannot be parsed
has ten wrong labels, background included.

Beside it: the share of right categories, of wholly right rows, the mean overlap (intersection over union) of the two
intervals, and two answers that need no sense of time: the most frequent category for the whole clip, and the true
category for the whole clip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from data.sources.ave import parse_event
from eval.benchmarks.base import Benchmark, Row, normalise, share

SECONDS = 10
MAX_LETTERS = 300  # a longer text is no answer of the form asked for
BACKGROUND = ""


class Event(NamedTuple):
    category: str
    start: float
    end: float


def labels(event: Event) -> list[str]:
    """One label a second, by the middle of the second."""
    return [event.category if event.start <= k + 0.5 < event.end else BACKGROUND for k in range(SECONDS)]


def overlap(one: Event, other: Event) -> float:
    """Intersection over union of two intervals, categories aside; 0 where either is empty."""
    both = max(0.0, min(one.end, other.end) - max(one.start, other.start))
    union = max(0.0, one.end - one.start) + max(0.0, other.end - other.start) - both
    return share(both, union)


class MiniworldEvents(Benchmark):
    name = "miniworld_events"
    source = "ave"
    options: ClassVar[dict[str, Any]] = {"video_dir": "videos", "audio_dir": "audio"}
    measure = "accuracy of labels per second"

    def parse(self, text: str) -> Event | None:
        found = parse_event(text.strip()) if len(text) <= MAX_LETTERS else None
        if found is None or not normalise(found[0]):
            return None
        return Event(normalise(found[0]), found[1], found[2])

    def points(self, row: Row) -> tuple[float, float]:
        truth, event = self._pair(row)
        if truth is None or event is None:
            return 0.0, float(SECONDS)
        return float(sum(a == b for a, b in zip(labels(event), labels(truth), strict=True))), float(SECONDS)

    def _pair(self, row: Row) -> tuple[Event | None, Event | None]:
        """The true and the predicted event."""
        return self.parse(row.answer), self.parse(row.prediction) if row.error is None else None

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        pairs = [self._pair(row) for row in rows]
        known = [(truth, event) for truth, event in pairs if truth and event]
        truths = [truth for truth, _ in pairs if truth]
        common = Counter(truth.category for truth in truths).most_common(1)[0][0] if truths else BACKGROUND
        inside = [(truth.category, sum(label != BACKGROUND for label in labels(truth))) for truth in truths]
        count = len(rows)
        return {
            "category_accuracy": share(sum(truth.category == event.category for truth, event in known), count),
            "exact": share(sum(truth == event for truth, event in known), count),
            "mean_iou": share(sum(overlap(truth, event) for truth, event in known), count),
            "baselines": {
                "majority_category_whole_clip": share(sum(n for name, n in inside if name == common), SECONDS * count),
                "true_category_whole_clip": share(sum(n for _, n in inside), SECONDS * count),
            },
        }
