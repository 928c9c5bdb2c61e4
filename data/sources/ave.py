"""AVE's annotations (Tian et al. 2018): an event seen and heard together in a 10 s clip, and its range of seconds.

    Category&VideoID&Quality&StartTime&EndTime        <- header, optional
    Church bell&RUhOCu3LNXM&good&0&10

A JSON array of {"category", "video_id", "start", "end"} is read too. The model is asked one fixed question and answers
in one fixed form, made by `format_event` and read back by `parse_event`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from data.schema import BadSample, Message, Sample, Text, UserError
from data.sources.music_avqa import clip
from data.sources.rows import Rows, describe, read_array, read_text, text_of

QUESTION = "Which event is seen and heard together, and when?"
_COLUMNS = "Category&VideoID&Quality&StartTime&EndTime"
_EVENT = re.compile(
    r"\s*(?P<category>\S.*?)\s*,?\s+from\s+(?P<start>\d+(?:\.\d+)?)\s+to\s+(?P<end>\d+(?:\.\d+)?)(?:\s*s(?:econds?)?)?\s*\.?\s*",
    re.IGNORECASE,
)


def format_event(category: str, start: float, end: float) -> str:
    """'Church bell, from 0 to 10 seconds'."""
    return f"{category}, from {start:g} to {end:g} seconds"


def parse_event(text: str) -> tuple[str, float, float] | None:
    """(category, start, end) of an answer in format_event's form; None if it is not, or the range is empty."""
    match = _EVENT.fullmatch(text)
    if match is None:
        return None
    start, end = float(match["start"]), float(match["end"])
    return (match["category"], start, end) if start < end else None


def read(
    path: Path,
    video_dir: str = "videos",
    audio_dir: str | None = None,
    question: str = QUESTION,
    instruction: str | None = None,
) -> Rows:
    """Rows of [video, sound, question] -> event and range. Options as in music_avqa.read, and the question's text."""
    text = read_text(path)
    as_json = text.lstrip()[:1] in ("[", "{")
    records = read_array(path, text) if as_json else _lines(path, text)
    parse = partial(_parse, video_dir=video_dir, audio_dir=audio_dir, question=question, instruction=instruction)
    return Rows(path, records, parse)


def _lines(path: Path, text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].replace(" ", "").lower().startswith("category&"):
        lines = lines[1:]
    if not lines:
        raise UserError(f"{path}: holds no annotations; expected lines of {_COLUMNS}")
    if lines[0].count("&") < 4:
        raise UserError(
            f"{path}: is neither JSON nor AVE's annotations; expected lines of {_COLUMNS}, found {lines[0][:60]!r}"
        )
    return lines


def _parse(
    record: Any, index: int, video_dir: str, audio_dir: str | None, question: str, instruction: str | None
) -> Sample:
    row = _fields(record) if isinstance(record, str) else record
    category, video_id = text_of(row, "category").strip(), text_of(row, "video_id").strip()
    start, end = _seconds(row, "start"), _seconds(row, "end")
    if not start < end:
        raise BadSample(f"the event's range is empty: from {start:g} to {end:g} seconds")
    before = (Text(f"{instruction}\n"),) if instruction else ()
    content = (*clip(video_id, video_dir, audio_dir), *before, Text(question, question=True))
    return Sample(
        id=f"{video_id}-{index}",
        messages=(Message("user", content), Message("assistant", (Text(format_event(category, start, end)),))),
        source="ave",
        row=index,
        meta={"category": category, "start": start, "end": end, "video_id": video_id},
    )


def _fields(line: str) -> dict[str, str]:
    values = line.rstrip("\r\n").split("&")
    if len(values) != 5:
        raise BadSample(f"expected the 5 fields {_COLUMNS}, found {len(values)}: {line[:80]!r}")
    category, video_id, _quality, start, end = values
    return {"category": category, "video_id": video_id, "start": start, "end": end}


def _seconds(row: dict[str, Any], key: str) -> float:
    value = row.get(key)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        seconds = float(value)
    except ValueError:
        found = repr(value) if isinstance(value, str) else describe(value)
        raise BadSample(f"'{key}' must be a number of seconds, found {found}") from None
    if not 0 <= seconds < float("inf"):
        raise BadSample(f"'{key}' must be a number of seconds from 0 up, found {value}")
    return seconds
