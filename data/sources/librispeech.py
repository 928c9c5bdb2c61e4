"""LibriSpeech as it is unpacked: transcripts beside the recordings, by speaker and chapter.

    LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt     103-1240-0000 CHAPTER ONE MISSUS RACHEL LYNDE IS ...
                                         103-1240-0000.flac

The path is the folder, or a subset or any other folder in it; all transcripts below are read. Other corpora in this
form are read too (not Multilingual LibriSpeech, which keeps one table of a whole split).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from data.schema import BadSample, Media, Sample, UserError
from data.sources.index import Raw, lines
from data.sources.rows import Rows, ask, utf8

PROMPT = "Transcribe speech to text."
TRANSCRIPTS = "*.trans.txt"


def read(
    path: Path,
    media_dir: Path | None = None,
    *,
    prompt: str = PROMPT,
    lower: bool = False,
    extension: str = ".flac",
    audio_as: str = "speech",
) -> Rows:
    """Rows of [recording, question] -> transcript. lower: in small letters (the published ones are in capitals).
    extension: of the recordings. UserError where the folder does not lie in media_dir, or holds no transcripts."""
    base = (media_dir or path.parent).resolve()
    if not path.resolve().is_relative_to(base):
        raise UserError(
            f"{path}: the recordings do not lie in media_dir = {base}; set the source's media_dir above them"
        )
    records = lines(sorted(path.rglob(TRANSCRIPTS)))
    if not len(records):
        raise UserError(
            f"{path}: holds no {TRANSCRIPTS}; expected LibriSpeech, or a folder in it such as train-clean-100"
        )
    below = path.resolve().relative_to(base)
    parse = partial(
        _parse, folder=path, below=below, prompt=prompt, lower=lower, extension=extension, audio_as=audio_as
    )
    return Rows(path, records, parse)


def _parse(
    raw: Raw, index: int, folder: Path, below: Path, prompt: str, lower: bool, extension: str, audio_as: str
) -> Sample:
    name, _, transcript = utf8(raw).partition(" ")
    if "/" in name or not transcript.strip():
        raise BadSample(
            f"{raw.path.name}, line {raw.line}: expected the recording's name and its transcript, found "
            f"{utf8(raw)[:60]!r}"
        )
    recording = below / raw.path.relative_to(folder).with_name(name + extension)
    text = transcript.strip()
    return Sample(
        id=name,
        messages=ask([Media("audio", recording.as_posix(), audio_as)], prompt, text.lower() if lower else text),
        source="librispeech",
        row=index,
        meta={"transcript": raw.path.name},
    )
