"""Readers of data formats: rows of a file to Samples. A new format is one file and one line in SOURCES."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data.schema import UserError, nearest
from data.sources import (
    alpaca,
    audiocaps,
    ave,
    hf,
    librispeech,
    llava,
    messages,
    music_avqa,
    sharegpt,
    slam,
    swift,
)
from data.sources.rows import Rows, existing

__all__ = ["SOURCES", "Rows", "Source", "annotation_files", "is_there", "open_source", "option_takers"]


class Source(NamedTuple):
    """A reader: read(path, [media_dir], *, options). folder: the files that hold the rows where a folder may be named
    (None: it wants a file). hub: a path at which nothing lies may be a name on the hub."""

    read: Callable[..., Rows]
    folder: str | None = None
    hub: bool = False


SOURCES: dict[str, Source] = {
    "messages": Source(messages.read),
    "llava": Source(llava.read),
    "sharegpt": Source(sharegpt.read),
    "alpaca": Source(alpaca.read),
    "swift": Source(swift.read),
    "slam": Source(slam.read),
    "audiocaps": Source(audiocaps.read),
    "librispeech": Source(librispeech.read, folder=librispeech.TRANSCRIPTS),
    "music_avqa": Source(music_avqa.read),
    "ave": Source(ave.read),
    "hf": Source(hf.read, folder="*", hub=True),
}


def open_source(
    source: str,
    path: str | Path,
    limit: int | None = None,
    media_dir: str | Path | None = None,
    *,
    strip_prefix: str | list[str] | None = None,
    **options: Any,
) -> Rows:
    """Open an annotation file in a known format; only its first `limit` rows where given.

    media_dir: what media paths are relative to, for formats whose rows name none (default: the path's folder).
    strip_prefix: a folder, or several, to take off the front of the rows' media paths, such as absolute ones of another
    machine; what remains is looked for in media_dir.
    UserError: unknown format or option, no such file, or a file that is not of the format at all (with line and
    column). A single broken row is a BadSample, raised when the row is asked for.
    """
    if source not in SOURCES:
        raise UserError(f"unknown data source '{source}'{nearest(source, SOURCES)}")
    kind = SOURCES[source]
    known = [p.name for taker in option_takers(source) for p in _parameters(taker) if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise UserError(f"data source '{source}': unknown option '{name}'{nearest(name, known)}")
    if "media_dir" in [parameter.name for parameter in _parameters(kind.read)]:
        options["media_dir"] = None if media_dir is None else Path(media_dir)
    path = Path(path)
    rows = kind.read(path if kind.hub else existing(path, source, folder=kind.folder is not None), **options)
    rows.strip_prefix = (strip_prefix,) if isinstance(strip_prefix, str) else tuple(strip_prefix or ())
    return rows if limit is None else rows.head(limit)


def option_takers(source: str) -> tuple[Callable[..., Rows], ...]:
    """The functions whose keyword-only arguments are the options of a format."""
    return SOURCES[source].read, open_source


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def is_there(source: str, path: Path) -> bool:
    """Whether a path can be opened as that source, as far as a look at the file system tells."""
    return path.is_file() or SOURCES[source].hub or (SOURCES[source].folder is not None and path.is_dir())


def annotation_files(source: str, path: Path) -> list[Path]:
    """The files that hold the rows; none for a name on the hub."""
    if path.is_dir():
        return sorted(file for file in path.rglob(SOURCES[source].folder or "*") if file.is_file())
    return [path] if path.is_file() else []
