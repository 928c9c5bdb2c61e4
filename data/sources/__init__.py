"""Readers of data formats: rows of a file to Samples. A new format is one file and one line in SOURCES."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.schema import UserError, nearest
from data.sources import ave, messages, music_avqa
from data.sources.rows import Rows, existing

__all__ = ["SOURCES", "Rows", "open_source"]

SOURCES: dict[str, Callable[..., Rows]] = {
    "music_avqa": music_avqa.read,
    "ave": ave.read,
    "messages": messages.read,
}


def open_source(source: str, path: str | Path, *, limit: int | None = None, **options: Any) -> Rows:
    """Open an annotation file in a known format; only its first `limit` rows where given.

    UserError: unknown format or option, no such file, or a file that is not of the format at all (with line and
    column). A single broken row is a BadSample, raised when the row is asked for.
    """
    if source not in SOURCES:
        raise UserError(f"unknown data source '{source}'{nearest(source, SOURCES)}")
    reader = SOURCES[source]
    known = [name for name in inspect.signature(reader).parameters if name != "path"]
    for name in options:
        if name not in known:
            raise UserError(f"data source '{source}': unknown option '{name}'{nearest(name, known)}")
    rows = reader(existing(Path(path), source), **options)
    return rows if limit is None else rows.head(limit)
