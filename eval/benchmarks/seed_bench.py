"""SEED-Bench (Li et al. 2023), the questions about images (nine dimensions, 14 233 questions).

File, as published (huggingface.co/datasets/AILab-CVC/SEED-Bench): SEED-Bench.json, {"questions": [...], "question_type":
{"Scene Understanding": 1, ...}} with rows

    {"question_id": "101669", "question": ..., "choice_a": ..., "choice_b": ..., "choice_c": ..., "choice_d": ...,
     "answer": "A", "data_type": "image", "data_id": "454426_2591111986", "question_type_id": 1}

Media folder: SEED-Bench-image, unpacked; an image is named by its data_id. Rows about videos are left out.

Predictions: rows {"image_path", "question", "answer", "output": [text]}; rules as for MMBench (choices.py), plain accuracy.

lmms-eval 0.7.3 (metric seed_image of its task seedbench) takes the first letter of the text: `(B)`, `The answer is B` and
an option's own words are wrong there, or right by chance (`cow` chooses C).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from data.schema import Media, Sample, UserError
from data.sources.rows import not_json, read_text, text_of
from eval.benchmarks.multiple_choice import MultipleChoice, lettered
from eval.benchmarks.questions import record_of

IMAGE_TYPES = [str(number) for number in range(1, 10)]


class SeedBench(MultipleChoice):
    name = "seed_bench"
    categories: ClassVar[tuple[str, ...]] = ("dimension",)
    home = (
        "get SEED-Bench.json and SEED-Bench-image.zip from huggingface.co/datasets/AILab-CVC/SEED-Bench, name the first "
        "as the path and the unpacked SEED-Bench-image as the media folder"
    )

    def records(self, path: Path) -> list[Any]:
        try:
            whole = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, {not_json(error)}") from None
        if not isinstance(whole, dict) or not isinstance(whole.get("questions"), list):
            raise UserError(f'{path}: expected {{"questions": [...]}}, as in SEED-Bench.json')
        types = whole.get("question_type")
        names = {str(number): name for name, number in types.items()} if isinstance(types, dict) else {}
        return [
            {**row, "dimension": names.get(str(row.get("question_type_id")))} if isinstance(row, dict) else row
            for row in whole["questions"]
            if not isinstance(row, dict) or _about_image(row)
        ]

    def prompt(self, record: Any, index: int) -> Sample:
        row = record_of(record)
        choices = lettered(row)
        image = text_of(row, "data_id")
        meta = {"dimension": row.get("dimension"), "image_path": image}
        name = str(row.get("question_id", index))
        media = [Media("image", image, "vision")]
        return self.asked(name, text_of(row, "question"), choices, text_of(row, "answer"), media, index, meta)


def _about_image(row: dict[str, Any]) -> bool:
    return row["data_type"] == "image" if "data_type" in row else str(row.get("question_type_id")) in IMAGE_TYPES
