"""AudioCaps (Kim et al. 2019): describe a sound; CIDEr-D against the five captions of each clip of the test split.

File, as published (github.com/cdjkim/audiocaps): dataset/test.csv with the columns audiocap_id, youtube_id, start_time,
caption, a line a caption. Media folder: the one that holds YOUTUBE_ID.wav, ten seconds from start_time (option `name`
for other names, such as "{audiocap_id}.wav" or "Y{youtube_id}.wav").

Predictions: eval/run.py's rows, or {"youtube_id" (or "audiocap_id", "audio_id"), "prediction" (or "caption"),
"references": [captions]}; without references, --annotations test.csv has them, and finds a clip by its youtube_id (a Y
before it or not) or by the audiocap_id of any of its captions. Score: the mean of CIDEr-D over all clips
(cider.py), between 0 and 10, a clip without an answer 0. official: the same.

lmms-eval 0.7.3 has no AudioCaps; its caption tasks (coco_cap and others) use the Penn Treebank tokenizer in Java, then
pycocoevalcap's Cider, which on the same tokens gives the same figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from data.schema import Media, Sample
from data.sources.rows import text_of
from eval.benchmarks.base import Benchmark, Earned, Row
from eval.benchmarks.cider import cider_d, tokens
from eval.benchmarks.fields import Fields, as_text
from eval.benchmarks.questions import ask, read_table

QUESTION = "Describe the sound in one sentence."
REFERENCES = ("references", "captions", "caption", "answer")


class AudioCaps(Benchmark):
    name = "audiocaps"
    measure = "CIDEr-D, 0 to 10"
    scale: ClassVar[str] = "points"
    separated_by = ("media",)
    right_or_wrong = False
    home = (
        "get dataset/test.csv from github.com/cdjkim/audiocaps, fetch its clips (YouTube), name the first as the path and "
        "the folder that holds YOUTUBE_ID.wav as the media folder"
    )

    def records(self, path: Path) -> list[Any]:
        clips: dict[tuple[str, str], dict[str, Any]] = {}
        for line in read_table(path, ",", ("youtube_id", "caption")):
            key = (str(line["youtube_id"]), str(line.get("start_time")))
            clip = clips.setdefault(key, {**line, "captions": [], "audiocap_ids": []})
            clip["captions"].append(line["caption"] or "")
            clip["audiocap_ids"] += filter(None, [line.get("audiocap_id")])
        return list(clips.values())

    def prompt(self, record: Any, index: int, *, name: str = "{youtube_id}.wav") -> Sample:
        clip = text_of(record, "youtube_id")
        path = name.replace("{youtube_id}", clip).replace("{audiocap_id}", str(record.get("audiocap_id")))
        captions = [caption for caption in record["captions"] if caption.strip()]
        named = {key: record.get(key) for key in ("youtube_id", "audiocap_id", "audiocap_ids")}
        answer, media = captions[0] if captions else "", [Media("audio", path, "audio")]
        return ask(clip, QUESTION, answer, media, index=index, source=self.name, meta={**named, "references": captions})

    def media_names(self, truth: Row) -> set[str]:
        clip = truth.meta.get("youtube_id")
        return {f"{clip}", f"Y{clip}", *truth.meta.get("audiocap_ids", ())}

    def truth(self, fields: Fields) -> str:
        captions = (as_text(fields.meta.get(key)) for key in REFERENCES)
        return next((caption for caption in captions if caption), fields.truth)

    def same_truth(self, row: Row, truth: Row) -> bool:
        """Whether they have a caption in common."""
        return bool(set(_references(row)) & set(_references(truth)))

    def parse(self, text: str) -> str | None:
        return " ".join(tokens(text)) or None

    def points(self, row: Row) -> tuple[float, float]:
        """Of this clip alone; its share of the score depends on the other clips, too (see `strict`)."""
        return self.strict([row])[0][1:3]

    def strict(self, rows: Sequence[Row]) -> list[Earned]:
        said = [row.said if row.error is None else "" for row in rows]
        scores = cider_d(said, [_references(row) for row in rows])
        return [Earned(row.unit, score, 1.0) for row, score in zip(rows, scores, strict=True)]

    def earnings(self, rows: Sequence[Row]) -> list[str]:
        """Over all rows: CIDEr-D of one clip alone is 0."""
        return [f"CIDEr-D {one.points:.2f}" for one in self.strict(rows)]

    def to_json(self, row: Row) -> dict[str, Any]:
        """No points by row: what a row earns depends on all references of the set."""
        return super().to_json(row) | {"points": None, "of": None, "correct": None}


def _references(row: Row) -> list[str]:
    for key in REFERENCES:
        value = row.meta.get(key)
        if isinstance(value, list):
            return [caption for caption in value if isinstance(caption, str) and caption.strip()]
    return [row.answer] if row.answer else []
