"""MUSIC-AVQA's question files (Li et al. 2022, https://gewu-lab.github.io/MUSIC-AVQA/), a JSON array of

    {"video_id": "00001234", "question_id": 1, "type": "[\\"Audio-Visual\\", \\"Counting\\"]",
     "question_content": "How many <Object> are sounding in the video?", "templ_values": "[\\"flute\\"]",
     "question_deleted": 0, "anser": "two"}

`anser` is the published spelling, `answer` is read too. `type` and `templ_values` are strings that hold JSON (plain
lists are read too); the question's <placeholders> are filled from templ_values in order.

MokA's own files name the media and have the question filled; absolute paths there are looked for below the media folder:

    {"video_id": "00001234", "question_id": 1, "type": ["Audio-Visual", "Counting"], "question": "How many ...?",
     "answer": "two", "video_path": "/data/videos/00001234.mp4", "audio_path": "/data/audio/00001234.mp3"}
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from data.schema import BadSample, Media, Sample
from data.sources.index import Raw, array_rows
from data.sources.rows import Rows, ask, below, key_of, text_of, value_of

_PLACEHOLDER = re.compile(r"<[^<>]+>")


def read(
    path: Path,
    media_dir: Path | None = None,
    *,
    video_dir: str = "videos",
    audio_dir: str | None = None,
    instruction: str | None = None,
) -> Rows:
    """Rows of [video, sound, question] -> answer.

    Options, relative to the media folder: the clips are video_dir/ID.mp4; their sound is audio_dir/ID.wav, or the
    clip's own track when audio_dir is not given. `instruction` is put before the question, and is not among its keys.
    """
    base = media_dir or path.parent
    parse = partial(_parse, base=base, video_dir=video_dir, audio_dir=audio_dir, instruction=instruction)
    return Rows(path, array_rows(path), parse)


def clip(video_id: str, video_dir: str, audio_dir: str | None) -> tuple[Media, Media]:
    """A clip's picture and its sound."""
    video = f"{video_dir}/{video_id}.mp4"
    return Media("video", video, "vision"), Media(
        "audio", f"{audio_dir}/{video_id}.wav" if audio_dir else video, "audio"
    )


def named_clip(row: dict[str, Any], base: Path) -> tuple[Media, Media] | None:
    """The clip of a row that names its files; None where it does not."""
    if not row.get("video_path"):
        return None
    video = below(base, text_of(row, "video_path"))
    sound = below(base, text_of(row, "audio_path")) if row.get("audio_path") else video
    return Media("video", video, "vision"), Media("audio", sound, "audio")


def _parse(raw: Raw, index: int, base: Path, video_dir: str, audio_dir: str | None, instruction: str | None) -> Sample:
    row = value_of(raw)
    video_id = text_of(row, "video_id")
    question = text_of(row, key_of(row, "question_content", "question"))
    if "question_content" in row:
        question = _fill(question, _list(row, "templ_values"))
    answer = text_of(row, key_of(row, "anser", "answer"), where="the row has no answer: ").strip()
    question_id = row.get("question_id", index)
    return Sample(
        id=f"{video_id}-{question_id}",
        messages=ask(named_clip(row, base) or clip(video_id, video_dir, audio_dir), question, answer, instruction),
        source="music_avqa",
        row=index,
        meta={"question_type": _list(row, "type"), "question_id": question_id, "video_id": video_id},
    )


def _list(row: dict[str, Any], key: str) -> list[str]:
    """A list, or a string that holds one as JSON; absent means empty."""
    value = row.get(key) or []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise BadSample(
                f"'{key}' holds no JSON list ({error.msg} at column {error.colno}); found {row[key]!r}"
            ) from None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadSample(f"'{key}' must be a list of texts; found {row[key]!r}")
    return value


def _fill(question: str, values: list[str]) -> str:
    holes = _PLACEHOLDER.findall(question)
    if len(holes) != len(values):
        raise BadSample(
            f"the question has {len(holes)} placeholders, but templ_values {len(values)} values: {question!r}, {values}"
        )
    remaining = iter(values)
    return _PLACEHOLDER.sub(lambda _: next(remaining), question)
