"""What one row of a predictions file says, whoever wrote it: eval/run.py, the published MokA scripts, other harnesses.

    eval/run.py     {"id", "index", "prediction", "answer", "unit", "meta", "error", ...}
    MME, MMBench,   {"rank", "index", "subtask"?, "image_path", "question", "answer", "output": [text]}
    POPE, SEED
    AVE             {"instruction", "output": "event:NAME start_time:A end_time:B</s>", "video_path", "predict": text}
    MUSIC-AVQA      {"output": "x</s>", "question_type": ["Audio-Visual", "Counting"], "predict": text}
    MMAU            {"id", "audio_id", "question", "choices", "answer", "task", "model_output": text}
    AIR-Bench       {"path", "question", "choice_a", ..., "answer_gt", "task_name", "uniq_id", "response": text}
    NeMo            {"audio_filepath", "text": reference, "pred_text": text}
    LLaVA           {"question_id", "prompt", "text": text}

The first key of PREDICTION that the row has holds the model's text, the first of TRUTH that is left the true answer
(without the tokenizer's </s>); a list counts by its first entry, null as the empty text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

PREDICTION = (
    "prediction", "predict", "model_output", "model_prediction", "pred_text", "response", "output", "text", "caption",
)  # fmt: skip
TRUTH = (
    "answer", "answer_gt", "label", "anser", "ground_truth", "output", "text", "transcript", "target", "reference",
)  # fmt: skip
MEDIA = (
    "image_path", "video_path", "audio_path", "image", "video", "audio", "image_id", "video_id", "audio_id",
    "audio_filepath", "wav", "source", "audiocap_id", "youtube_id", "data_id", "path",
)  # fmt: skip
QUESTION = ("question", "instruction", "question_content", "prompt")
IDS = ("id", "uniq_id", "question_id", "key")
KIND = ("subtask", "category", "question_type", "type", "task", "task_name", "dataset_name", "choices")


@dataclass(slots=True)
class Fields:
    """One record, taken apart. content: what was asked and what is true, as one text; equal in repeated rows.

    index: its number in the data set, or among the rows of the process `rank`. readable: it holds a model's answer.
    has_truth: it holds a true answer, be it empty.
    """

    prediction: str = ""
    truth: str = ""
    has_truth: bool = False
    id: str = ""
    media: str = ""
    question: str = ""
    unit: str = ""
    own: bool = False
    readable: bool = True
    error: str | None = None
    index: int | None = None
    rank: Any = None
    meta: dict[str, Any] = field(default_factory=dict)
    content: str = ""


def take_apart(record: Any) -> Fields:
    """The fields of one record; `error` says why it cannot be used."""
    if not isinstance(record, dict):
        return Fields(error=f"expected an object, found {type(record).__name__}", readable=False)
    own = "prediction" in record and "unit" in record
    said = next((key for key in PREDICTION if key in record), None)
    others = {key: value for key, value in record.items() if key != said}
    fields = Fields(own=own, content=_content(others))
    fields.truth = without_end(_first_text(others, TRUTH))
    fields.has_truth = any(isinstance(others.get(key), str) for key in TRUTH)
    fields.id, fields.media, fields.question = (_first_text(others, keys) for keys in (IDS, MEDIA, QUESTION))
    index = record.get("index")
    fields.index = index if isinstance(index, int) and not isinstance(index, bool) else None
    fields.rank = record.get("rank")
    fields.meta = others
    if own:
        fields.meta = record["meta"] if isinstance(record.get("meta"), dict) else {}
        fields.unit = as_text(record["unit"]) or ""
        fields.error = as_text(record.get("error")) or None
    if said is None:
        fields.readable = False
        fields.error = f"no answer of a model in it; expected one of the keys {', '.join(PREDICTION)}"
        return fields
    text = as_text(record[said])
    if text is None:
        fields.error = fields.error or f"'{said}' is neither a text nor a list of texts"
    fields.prediction = text or ""
    return fields


def as_text(value: Any) -> str | None:
    """A JSON value as a text; the first entry of a list; None where there is no text in it."""
    if isinstance(value, list | tuple):
        value = value[0] if value else ""
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    return value if isinstance(value, str) else None


def without_end(text: str) -> str:
    """A true answer without the tokenizer's end mark and the space around it."""
    return text.replace("</s>", "").strip()


def _first_text(record: dict[str, Any], keys: tuple[str, ...]) -> str:
    found = (as_text(record[key]) for key in keys if key in record)
    return next((text for text in found if text), "")


def _content(record: dict[str, Any]) -> str:
    kept = {key: record[key] for key in (*IDS, *MEDIA, *QUESTION, *TRUTH, *KIND) if key in record}
    return json.dumps(kept, sort_keys=True, default=str)
