"""AIR-Bench, foundation part (Yang et al. 2024): multiple-choice questions about speech (and sound and music).

Folder, as published (github.com/OFA-Sys/AIR-Bench, huggingface.co/datasets/qyang1021/AIR-Bench-Dataset):
Foundation_meta.json, a JSON array of

    {"path": ..., "question": ..., "choice_a": ..., "choice_b": ..., "choice_c"?, "choice_d"?, "answer_gt": text,
     "task_name": "Emotion_recognition", "dataset_name": "iemocap", "uniq_id": ...}

Media folder: Foundation, the recording being TASK_DATASET/PATH in it (flac in place of wav for Audio_Grounding). Only
speech tasks are asked, unless the option tasks is "all"; recordings of speech go to the modality of the option
speech_as (default: speech).

    strict     the option that the text chooses, by letter or by its words (choices.py); all rows count
    official   the publishers' scorer, which is meant for answers that GPT has put in form: the first letter of the
               stripped text, if it is A, B, C or D, else the last but one; rows where neither is one leave the
               denominator

The score is over all rows (the publishers print tasks apart: table `task`). Predictions: the publishers' rows with
"response", or eval/run.py's.

lmms-eval 0.7.3 (tasks air_bench_foundation_*) reads and draws letters as its MMAU does (mmau.py), among the options that
there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.schema import Media, Sample
from data.sources.index import array_rows
from data.sources.rows import Rows, text_of, value_of
from eval.benchmarks.base import Earned, Row
from eval.benchmarks.multiple_choice import MultipleChoice
from eval.benchmarks.questions import record_of

SPEECH = (
    "Speech_Grounding", "Spoken_Language_Identification", "Speaker_Gender_Recognition", "Emotion_Recognition",
    "Speaker_Age_Prediction", "Speech_Entity_Recognition", "Intent_Classification", "Speaker_Number_Verification",
    "Synthesized_Voice_Detection",
)  # fmt: skip
_SPEECH = {name.lower() for name in SPEECH}
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


class AirBench(MultipleChoice):
    name = "air_bench"
    categories: ClassVar[tuple[str, ...]] = ("task_name",)
    home = (
        "get the Foundation folder from huggingface.co/datasets/qyang1021/AIR-Bench-Dataset, name its "
        "Foundation_meta.json as the path and the folder as the media folder"
    )

    def open(
        self, path: Path, media_dir: Path | None = None, *, tasks: Literal["speech", "all"] = "speech", **options: Any
    ) -> Rows:
        records = [value_of(raw) for raw in array_rows(path)]
        kept = records if tasks == "all" else [record for record in records if _is_speech(record)]
        return Rows(path, kept, partial(self.prompt, **options))

    def prompt(self, record: Any, index: int, *, speech_as: str = "speech") -> Sample:
        row = record_of(record)
        task = text_of(row, "task_name")
        path = f"{task}_{text_of(row, 'dataset_name')}/{text_of(row, 'path')}"
        if task == "Audio_Grounding":
            path = path[:-3] + "flac"
        media = [Media("audio", path, speech_as if _is_speech(row) else "audio")]
        meta = {"task_name": task, "dataset_name": row["dataset_name"], "path": row["path"]}
        name = str(row.get("uniq_id", index))
        return self.asked(name, text_of(row, "question"), _choices(row), text_of(row, "answer_gt"), media, index, meta)

    def choices_of(self, row: Row) -> list[str]:
        return _choices(row.meta) or super().choices_of(row)

    def official_reading(self, row: Row) -> str | None:
        text = row.prediction.strip().replace("\n", "")
        if text in ("", "None"):
            return None
        return next((letter for letter in (text[0], text[-2:-1]) if letter and letter in "ABCD"), None)

    def official(self, rows: Sequence[Row]) -> list[Earned]:
        return super().official([row for row in rows if self.official_reading(row) is not None])

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return super().official_details([row for row in rows if self.official_reading(row) is not None])


def _choices(row: dict[str, Any]) -> list[str]:
    return [str(row[key]) for key in CHOICES if row.get(key) is not None]


def _is_speech(row: Any) -> bool:
    return not isinstance(row, dict) or str(row.get("task_name", "")).lower() in _SPEECH
