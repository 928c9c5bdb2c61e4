"""AVE (Tian et al. 2018): 28 audio-visual events in clips of ten seconds; scored by ten labels a clip.

Files, as published (github.com/YapengTian/AVE-ECCV18, AVE_Dataset.zip): Annotations.txt for all clips and testSet.txt
for the 402 of the test split, lines NAME&VIDEO_ID&quality&start&end (rows: data/sources/ave.py); media folder: the one
that holds AVE/ID.mp4, whose own track is the sound.

Predictions: rows of the published MokA script {"instruction", "output": "event:NAME start_time:A end_time:B</s>",
"video_path", "predict": "... <event> NAME </event> ... <range> a,b </range>"}, or eval/run.py's, whose answers may also
be in the form of data.sources.ave.format_event. The truth is the annotation of the row's clip where a file of
annotations is given, else the row's own "output".

    parsed     exactly one <event> NAME </event> with one of the 28 names, and one or more <range> a,b </range> (several
               are joined), or <event> NAME (a b) </event> without a range; a and b are whole seconds, both included
    strict     the share of right labels over all clips; an unparsed clip has ten wrong ones (events.py)
    official   the labels of the parsed rows fill two arrays of zeros, prediction and truth, of ten times the rows, from
               the front; the accuracy is taken over the whole arrays, so that an unparsed row has ten right labels. NAME
               counts as it is written, case included

Annotations.txt holds all three splits: from it, or any file of more than the test split's 402 clips, annotations are looked
up only, and clips without a prediction do not count, which is told. Of any other file, testSet.txt, every clip counts.

lmms-eval 0.7.3 has no AVE; eval/lmms/tasks/ave.yaml is this benchmark as a task of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from eval.benchmarks.base import Earned, Row, normalise
from eval.benchmarks.events import MAX_LETTERS, SECONDS, Event, Events, labels
from eval.benchmarks.tags import tagged

NAMES = (
    "Church bell", "Male speech, man speaking", "Bark", "Fixed-wing aircraft, airplane", "Race car, auto racing",
    "Female speech, woman speaking", "Helicopter", "Violin, fiddle", "Flute", "Ukulele", "Frying (food)", "Truck",
    "Shofar", "Motorcycle", "Acoustic guitar", "Train horn", "Clock", "Banjo", "Goat", "Baby cry, infant cry", "Bus",
    "Chainsaw", "Cat", "Horse", "Toilet flush", "Rodents, rats, mice", "Accordion", "Mandolin",
)  # fmt: skip
TEST_CLIPS = 402
_NAMES = {normalise(name) for name in NAMES}
_RANGE = re.compile(r"(\d{1,9})\s{0,9},\s{0,9}(\d{1,9})")
_IN_NAME = re.compile(r"\(\s{0,9}(\d{1,9})\s{1,9}(\d{1,9})\s{0,9}\)$")
_TRUTH = re.compile(r"event:\s*(\S.*?)\s+start_time:\s*(\d+(?:\.\d+)?)\s+end_time:\s*(\d+(?:\.\d+)?)", re.IGNORECASE)


class Ave(Events):
    name = "ave"
    options: ClassVar[dict[str, Any]] = {"video_dir": "AVE"}
    home = (
        "get AVE_Dataset.zip from github.com/YapengTian/AVE-ECCV18, name its testSet.txt (or Annotations.txt) as the path "
        "and the folder that holds AVE/ID.mp4 as the media folder"
    )

    def parse(self, text: str) -> Event | None:
        """An answer with tags, or in this project's own form; categories normalised."""
        return self._normalised(text) if "<event>" in text else self._known(super().parse(text))

    def reading(self, row: Row) -> Event | None:
        if row.error is not None:
            return None
        return self._normalised(row.said) if row.published else self.parse(row.said)

    def _normalised(self, text: str) -> Event | None:
        event = event_in_tags(text)
        return self._known(event._replace(category=normalise(event.category)) if event else None)

    def _known(self, event: Event | None) -> Event | None:
        return event if event and event.category in _NAMES else None

    def true_event(self, row: Row) -> Event | None:
        """By the annotation's own form, or the published rows' "output"; its name need not be one of the 28."""
        return super().parse(row.answer) or _published_truth(row.answer)

    def same_truth(self, row: Row, truth: Row) -> bool:
        return self.true_event(row) == self.true_event(truth)

    def covers_other_splits(self, path: Path, rows: int) -> bool:
        return path.name == "Annotations.txt" or rows > TEST_CLIPS

    def truth_error(self, row: Row) -> str | None:
        if self.true_event(row):
            return None
        return f"the true answer is no `event:NAME start_time:A end_time:B`: {row.answer[:60]!r}"

    # ---- official ----------------------------------------------------------------------------------------------------

    def official_reading(self, row: Row) -> Event | None:
        event = event_in_tags(row.prediction)
        if event is None and not row.published and "<event>" not in row.prediction:
            return self.reading(row)
        return self._normalised(row.prediction) if event and event.category in NAMES else None

    def official(self, rows: Sequence[Row]) -> list[Earned]:
        return [Earned(row.unit, self._official_points(row), float(SECONDS)) for row in rows]

    def _official_points(self, row: Row) -> float:
        event, truth = self.official_reading(row), self.true_event(row)
        if event is None:
            return float(SECONDS)
        true = labels(truth) if truth else [""] * SECONDS
        return float(sum(a == b for a, b in zip(labels(event), true, strict=True)))


def event_in_tags(text: str) -> Event | None:
    """The event between tags, its name as written; None where there is none, or two, or no range."""
    named = tagged(text, "event")
    if len(named) != 1:
        return None
    name = named[0]
    spans = [_RANGE.fullmatch(part.rpartition("<range>")[2].strip()) for part in tagged(text, "range")]
    found = [(int(match[1]), int(match[2]) + 1) for match in spans if match]
    inner = _IN_NAME.search(name[-60:])
    if not found and inner:
        found = [(int(inner[1]), int(inner[2]) + 1)]
        name = name[: len(name) - len(inner[0])].strip()
    if not found or not name:
        return None
    return Event(name, float(found[0][0]), float(found[0][1]), tuple((float(a), float(b)) for a, b in found[1:]))


def _published_truth(text: str) -> Event | None:
    match = _TRUTH.search(text) if len(text) <= MAX_LETTERS else None
    return Event(normalise(match[1]), float(match[2]), float(match[3])) if match else None
