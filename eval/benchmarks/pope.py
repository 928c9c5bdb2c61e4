"""POPE (Li et al. 2023): is there a ... in the image? Objects that are there, and ones that are not.

Files, as published (github.com/AoiDragon/POPE, output/coco): coco_pope_random.json, coco_pope_popular.json and
coco_pope_adversarial.json, one object a line; media folder: COCO's val2014 (cocodataset.org), the images by their name:

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?",
     "label": "yes"}

Predictions: rows of the published MokA script {"image_path", "question", "answer", "output": [text]}. Rules and figures
as in yes_no.py; the score is the accuracy over all rows. A `category` or `subtask` of the rows gets a table.

lmms-eval 0.7.3 (task pope) wants the one word: `Yes.` and `Yes, there is` are wrong there. Such answers leave its recall
and precision, and its yes-ratio is that of the true answers, whatever was said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from data.schema import Media, Sample
from data.sources.rows import text_of
from eval.benchmarks.base import Row, share
from eval.benchmarks.questions import ask, record_of
from eval.benchmarks.yes_no import YesNo

INSTRUCTION = "Answer with yes or no."


class Pope(YesNo):
    name = "pope"
    home = (
        "get coco_pope_{random,popular,adversarial}.json from github.com/AoiDragon/POPE (output/coco), name one as the "
        "path, and COCO's val2014 images (cocodataset.org) as the media folder"
    )

    def rates(self, rows: Sequence[Row], reading: Callable[[Row], Any]) -> dict[str, Any]:
        parts: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            named = row.meta.get("category") or row.meta.get("subtask")
            if isinstance(named, str):
                parts[named].append(row)
        tables = {}
        for name, members in sorted(parts.items()):
            rates = super().rates(members, reading)
            del rates["baselines"]
            right = sum(self.right(row, reading) for row in members)
            tables[name] = {"rows": len(members), "accuracy": share(right, len(members)), **rates}
        return super().rates(rows, reading) | ({"categories": tables} if tables else {})

    def prompt(self, record: Any, index: int) -> Sample:
        row = record_of(record)
        image = Media("image", text_of(row, "image"), "vision")
        question, answer = text_of(row, "text"), text_of(row, "label")
        name = str(row.get("question_id", index))
        return ask(name, question, answer, [image], index=index, source=self.name, instruction=INSTRUCTION)
