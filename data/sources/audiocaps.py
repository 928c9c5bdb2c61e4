"""AudioCaps' csv (Kim et al. 2019; 2.0 has the same columns): a sound and a sentence that says what is heard.

    audiocap_id,youtube_id,start_time,caption
    91139,r1nicOVtvkQ,130,"A woman talks nearby as water pours"

How the sounds are called depends on what fetched them: `file` is a pattern over the columns, such as
"train/{youtube_id}_{start_time}.wav" or "Y{youtube_id}.flac"; a whole number may have a format, "{start_time:06d}".
"""

from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path

from data.schema import BadSample, Media, Sample, UserError, nearest
from data.sources.index import Raw, lines
from data.sources.rows import Rows, ask, columns_of, text_of, utf8

PROMPT = "Describe the sound."
_PLACE = re.compile(r"{(.*?)(?::(.*?))?}")
_COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")


def read(path: Path, *, file: str = "{youtube_id}.wav", prompt: str = PROMPT, audio_as: str = "audio") -> Rows:
    """Rows of [sound, question] -> caption. file: its name below the media folder; prompt: the question of all rows."""
    for name, form in _PLACE.findall(file):
        if name not in _COLUMNS:
            raise UserError(f"data source 'audiocaps': file: unknown column '{name}'{nearest(name, _COLUMNS)}")
        try:
            format(0, form)
        except ValueError:
            raise UserError(
                f"data source 'audiocaps': file: '{form}' in '{{{name}:{form}}}' is no format of a whole number; expected "
                "such as 06d"
            ) from None
    found = lines([path])
    if not len(found):
        raise UserError(f"{path}: is empty; expected the columns {','.join(_COLUMNS)}")
    header = _fields(found[0])
    for name in _COLUMNS:
        if name not in header:
            raise UserError(f"{path}: has no column '{name}' ({columns_of(dict.fromkeys(header), name)})")
    rows = Rows(
        path, found.without_first(), partial(_parse, header=header, file=file, prompt=prompt, audio_as=audio_as)
    )
    if not len(rows):
        raise UserError(f"{path}: holds no rows below its header")
    return rows


def _parse(raw: Raw, index: int, header: list[str], file: str, prompt: str, audio_as: str) -> Sample:
    values = _fields(raw)
    if len(values) != len(header):
        raise BadSample(f"line {raw.line}: expected {len(header)} fields, found {len(values)}: {utf8(raw)[:80]!r}")
    row = dict(zip(header, values, strict=True))
    name = _PLACE.sub(lambda match: _written(row, match[1], match[2]), file)
    return Sample(
        id=text_of(row, "audiocap_id"),
        messages=ask([Media("audio", name, audio_as)], prompt, text_of(row, "caption")),
        source="audiocaps",
        row=index,
        meta={key: value for key, value in row.items() if key not in ("audiocap_id", "caption")},
    )


def _written(row: dict[str, str], column: str, form: str) -> str:
    value = text_of(row, column)
    if form and not value.isdecimal():
        raise BadSample(f"'{column}' must be a whole number to be written as '{form}', found {value!r}")
    return format(int(value), form) if form else value


def _fields(raw: Raw) -> list[str]:
    try:
        return next(csv.reader([utf8(raw)], strict=True))
    except csv.Error as error:
        raise BadSample(f"line {raw.line}: is no line of csv ({error}); a caption must stand on one line") from None
