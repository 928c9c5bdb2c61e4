"""AIR-Bench, foundation part (Yang et al. 2024): multiple-choice questions about speech (and sound and music).

Folder, as published (github.com/OFA-Sys/AIR-Bench, huggingface.co/datasets/qyang1021/AIR-Bench-Dataset):
Foundation_meta.json, a JSON array of

    {"path": ..., "question": ..., "choice_a": ..., "choice_b": ..., "choice_c"?, "choice_d"?, "answer_gt": text,
     "task_name": "Speaker_Emotion_Recontion", "dataset_name": "iemocap", "uniq_id": ...}

Media folder: Foundation, the recording being TASK_DATASET/PATH in it (flac in place of wav for Audio_Grounding). Only
speech tasks are asked, unless the option tasks is "all"; a task of neither list below is an error then. Recordings of
speech go to the modality of the option speech_as (default: speech).

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

from data.schema import Media, Sample, UserError, nearest
from data.sources.index import array_rows
from data.sources.rows import Rows, text_of, value_of
from eval.benchmarks.base import Earned, Row
from eval.benchmarks.multiple_choice import MultipleChoice, lettered
from eval.benchmarks.questions import record_of

# as the publishers spell them in the file
SPEECH = (
    "Speech_Grounding", "Spoken_Language_Identification", "Speaker_Gender_Recognition", "Speaker_Emotion_Recontion",
    "Speaker_Age_Prediction", "Speech_Entity_Reconition", "Speaker_Intent_Classification",
    "Speaker_Number_Verification", "Synthesized_Voice_Detection",
)  # fmt: skip
SOUND_AND_MUSIC = (
    "Audio_Grounding", "vocal_sound_classification", "Acoustic_Scene_Classification", "Sound_AQA",
    "Music_Instruments_Classfication", "Music_Genre_Recognition", "Music_Midi_Pitch_Analysis",
    "Music_Midi_Velocity_Analysis", "Music_AQA", "Music_Mood_Recognition",
)  # fmt: skip
# as the paper and other files spell them
CORRECTED = (
    "Emotion_Recognition", "Speaker_Emotion_Recognition", "Speech_Entity_Recognition", "Intent_Classification",
)  # fmt: skip
_SPEECH = {name.lower() for name in SPEECH + CORRECTED}
_OTHERS = {name.lower() for name in (*SOUND_AND_MUSIC, "Music_Instruments_Classification")}


class AirBench(MultipleChoice):
    name = "air_bench"
    categories: ClassVar[tuple[str, ...]] = ("task_name",)
    texts_are_true = True
    home = (
        "get the Foundation folder from huggingface.co/datasets/qyang1021/AIR-Bench-Dataset, name its "
        "Foundation_meta.json as the path and the folder as the media folder"
    )

    def open(
        self, path: Path, media_dir: Path | None = None, *, tasks: Literal["speech", "all"] = "speech", **options: Any
    ) -> Rows:
        records = [value_of(raw) for raw in array_rows(path)]
        if tasks == "speech":
            _check_tasks(path, records)
            records = [
                record for record in records if _task(record) not in _OTHERS
            ]  # one without a task is bad, and stays
        return Rows(path, records, partial(self.prompt, **options))

    def prompt(self, record: Any, index: int, *, speech_as: str = "speech") -> Sample:
        row = record_of(record)
        task = text_of(row, "task_name")
        path = f"{task}_{text_of(row, 'dataset_name')}/{text_of(row, 'path')}"
        if task == "Audio_Grounding":
            path = path[:-3] + "flac"
        media = [Media("audio", path, speech_as if _task(row) in _SPEECH else "audio")]
        meta = {"task_name": task, "dataset_name": row["dataset_name"], "path": row["path"]}
        name = str(row.get("uniq_id", index))
        return self.asked(name, text_of(row, "question"), lettered(row), text_of(row, "answer_gt"), media, index, meta)

    def choices_of(self, row: Row) -> list[str]:
        return lettered(row.meta) or super().choices_of(row)

    def official_reading(self, row: Row) -> str | None:
        text = row.prediction.strip().replace("\n", "")
        return next((letter for letter in (text[:1], text[-2:-1]) if letter and letter in "ABCD"), None)

    def official(self, rows: Sequence[Row]) -> list[Earned]:
        return super().official([row for row in rows if self.official_reading(row) is not None])

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return super().official_details([row for row in rows if self.official_reading(row) is not None])


def _task(record: Any) -> str:
    """The row's task in lower case; "" where it names none."""
    name = record.get("task_name") if isinstance(record, dict) else None
    return name.lower() if isinstance(name, str) else ""


def _check_tasks(path: Path, records: Sequence[Any]) -> None:
    """UserError where a task is neither known as one of speech nor as one of sound or music."""
    unknown = sorted({record["task_name"] for record in records if _task(record) not in {"", *_SPEECH, *_OTHERS}})
    if unknown:
        raise UserError(
            f"{path}: holds tasks that are none of AIR-Bench's, so that nothing tells whether they are of speech: "
            f"{', '.join(unknown[:10])}{nearest(unknown[0], SPEECH + SOUND_AND_MUSIC)}; correct each task_name, or ask "
            "all tasks with the option tasks=all"
        )
