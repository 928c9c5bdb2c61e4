"""AVE's annotations (Tian et al. 2018): an event seen and heard together in a 10 s clip, and its range of seconds.

    Category&VideoID&Quality&StartTime&EndTime        <- header, optional
    Church bell&RUhOCu3LNXM&good&0&10

A JSON array of {"category", "video_id", "start", "end"} is read too, and MokA's own names {"event", "vid",
"start_time", "end_time"}, with video_path and audio_path as in music_avqa.py where a row has them. The model is asked
one fixed question and answers in one fixed form, made by `format_event` and read back by `parse_event`. That form has no
answer for an event of no length, so that such a row is bad; the published files have one, for training (VWi2ENBuTbw).
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from data.schema import BadSample, Sample, UserError
from data.sources.index import Raw, Spans, array_rows, first_character, lines
from data.sources.music_avqa import clip, named_clip
from data.sources.rows import Rows, ask, describe, key_of, text_of, utf8, value_of

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
    media_dir: Path | None = None,
    *,
    video_dir: str | None = None,
    audio_dir: str | None = None,
    question: str = QUESTION,
    instruction: str | None = None,
) -> Rows:
    """Rows of [video, sound, question] -> event and range. Options as in music_avqa.read, and the question's text.

    video_dir: without it `AVE`, as published, where the media folder has one, else `videos`."""
    base = media_dir or path.parent
    video_dir = video_dir or next((name for name in ("AVE", "videos") if (base / name).is_dir()), "videos")
    as_json = first_character(path) in ("[", "{")
    records = array_rows(path) if as_json else _lines(path)
    parse = partial(
        _parse, as_json=as_json, base=base, video_dir=video_dir, audio_dir=audio_dir, question=question,
        instruction=instruction,
    )  # fmt: skip
    return Rows(path, records, parse)


def _lines(path: Path) -> Spans:
    found = lines([path], skip=_is_header)
    if not len(found):
        raise UserError(f"{path}: holds no annotations; expected lines of {_COLUMNS}")
    first = found[0].text
    if first.count(b"&") < 4:
        raise UserError(
            f"{path}: is neither JSON nor AVE's annotations; expected lines of {_COLUMNS}, found "
            f"{first.decode(errors='replace')[:60]!r}"
        )
    return found


def _is_header(line: bytes) -> bool:
    return line.replace(b" ", b"").lower().startswith(b"category&videoid&")


def _parse(
    raw: Raw, index: int, as_json: bool, base: Path, video_dir: str, audio_dir: str | None, question: str,
    instruction: str | None,
) -> Sample:  # fmt: skip
    row = value_of(raw) if as_json else _fields(utf8(raw))
    category = text_of(row, key_of(row, "category", "event")).strip()
    video_id = text_of(row, key_of(row, "video_id", "vid")).strip()
    start = _seconds(row, key_of(row, "start", "start_time"))
    end = _seconds(row, key_of(row, "end", "end_time"))
    if not start < end:
        raise BadSample(f"the event's range is empty: from {start:g} to {end:g} seconds")
    return Sample(
        id=f"{video_id}-{index}",
        messages=ask(
            named_clip(row, base) or clip(video_id, video_dir, audio_dir),
            question,
            format_event(category, start, end),
            instruction,
        ),
        source="ave",
        row=index,
        meta={"category": category, "start": start, "end": end, "video_id": video_id},
    )


def _fields(line: str) -> dict[str, str]:
    values = line.split("&")
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
    except (ValueError, OverflowError):
        found = repr(value) if isinstance(value, str) else describe(value)
        raise BadSample(f"'{key}' must be a number of seconds, found {found}") from None
    if not 0 <= seconds < float("inf"):
        raise BadSample(f"'{key}' must be a number of seconds from 0 up, found {value}")
    return seconds
