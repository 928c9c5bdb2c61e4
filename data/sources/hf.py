"""Hugging Face `datasets`: a folder of save_to_disk, tables in files, or a data set of the hub.

    path: saved/                     a folder that `save_to_disk` wrote
    path: rows.parquet               a .parquet, .arrow, .jsonl, .json or .csv file
    path: folder/                    a folder of such, or a downloaded repository: its splits and `subset` are found by
                                     their names, as on the hub; or of pictures and sounds with a metadata.jsonl or .csv
    path: user/name                  the hub (its cache is used where it was downloaded before)

A row is read by `layout`: that of a conversation format (messages, llava, sharegpt, alpaca, swift), or `columns`: one
question and one answer a row, with media, from the columns that `columns` names:

    options: {columns: {question: prompt, answer: label, image: file, instruction: task}}
    options: {columns: {answer: text, speech: audio}, prompt: Transcribe speech to text.}    no question of its own

Columns called question, answer, image, video, audio or speech need not be named; {image: ""} leaves one out.

Cells of a csv file are texts, as they stand there ("007", "None"). In other tables columns have types: numbers are taken as
`datasets` gives them (7 beside 7.5 in a jsonl is 7.0), booleans and dates are refused: write answers as texts. So it is
with csv files of the hub and a `metadata.csv`, which `datasets` itself finds.

The rows are memory mapped: they cost no memory, and are read in any order. A run needs that, and their number: a place
in the epoch is a function of the seed, a resume goes on in the middle. So nothing is trained from an endless stream;
`stream: N` fetches the first N rows of the hub's stream, without downloading the rest, into an Arrow file in the cache
of `datasets`, and reads them from there.

Media are paths in columns; the absolute paths that `datasets` gives to files of a folder are taken where they lie below
media_dir. A column that holds bytes (what `datasets` makes of pictures and sounds) wants the option `extract: FOLDER`: a
row's media are written below media_dir/FOLDER, named by their content, when it is first read.

Cost: conversations are counted in one pass over their columns (about 20 us a row); `columns` needs none. Media inside of
other columns (lists, parts of messages) are copied once into the cache of `datasets`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.schema import MEDIA, Media, Sample, UserError, first_line, nearest
from data.sources import alpaca, llava, messages, sharegpt, swift
from data.sources.conversations import Layout, count_answers, sample_of
from data.sources.placeholders import entries_of, path_of
from data.sources.rows import Rows, ask, chosen, columns_of, text_of

_LAYOUTS: dict[str, Callable[..., Layout]] = {
    "messages": messages.layout,
    "llava": llava.layout,
    "sharegpt": sharegpt.layout,
    "alpaca": alpaca.layout,
    "swift": swift.layout,
}
_FILES = {".parquet": "parquet", ".arrow": "arrow", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_MEDIA = ("Image", "Audio", "Video")  # types of columns in `datasets`; others can be decoded, too, such as Json
_COLUMNS = {"question": "question", "answer": "answer", "instruction": "", "id": "id"} | dict.fromkeys(MEDIA, "")


class _Table(Sequence[tuple[dict[str, Any], int]]):
    """(row, turn) of every answer of a `datasets.Dataset`, which is pickled as references to its files.

    extract: the folder below media_dir that bytes of media are written to.
    """

    def __init__(self, table: Any, layout: Layout | None, media_dir: Path, extract: str | None) -> None:
        self.table, self.media_dir, self.extract = table, media_dir, extract
        self.labels = {name: f.names for name, f in table.features.items() if type(f).__name__ == "ClassLabel"}
        self.row = None
        if layout is not None:
            light = table.remove_columns([name for name, feature in table.features.items() if _is_media(feature)])
            counts = array("I", (max(1, count_answers(row, layout)) for row in light))
            self.row = np.repeat(np.arange(len(table)), counts)

    def __len__(self) -> int:
        return len(self.table) if self.row is None else len(self.row)

    def __getitem__(self, index: Any) -> Any:
        row = int(index if self.row is None else self.row[index])
        turn = 0 if self.row is None else int(index - np.searchsorted(self.row, row))
        return {name: self._named(name, self._as_files(value)) for name, value in self.table[row].items()}, turn

    def _named(self, column: str, value: Any) -> Any:
        """A class by its name, where a column holds numbers of classes; -1 stands for none."""
        if column not in self.labels or not isinstance(value, int):
            return value
        return self.labels[column][value] if value >= 0 else None

    def _as_files(self, value: Any) -> Any:
        """Structs of media as paths below media_dir, where their bytes or a file are; anything else as it is."""
        if isinstance(value, list):
            return [self._as_files(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"bytes", "path"} and value["bytes"] is None:
            return _below(self.media_dir, value["path"])
        if self.extract is not None and value.keys() == {"bytes", "path"} and isinstance(value["bytes"], bytes):
            return _extracted(value, self.media_dir, self.extract)
        return {name: self._as_files(entry) for name, entry in value.items()}


def _below(media_dir: Path, path: Any) -> Any:
    """An absolute path below media_dir as one relative to it; anything else as it is."""
    if not isinstance(path, str) or not os.path.isabs(path):
        return path
    relative = os.path.relpath(path, os.path.abspath(media_dir))
    return path if relative.startswith("..") else relative


def _extracted(medium: dict[str, Any], media_dir: Path, folder: str) -> str:
    """The path below media_dir of a file that holds a medium's bytes, written where it is not there."""
    suffix = re.search(r"\.[A-Za-z0-9]{1,5}$", medium["path"] or "")
    name = hashlib.sha256(medium["bytes"]).hexdigest()[:32] + (suffix[0].lower() if suffix else "")
    target = media_dir / folder / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{name}.{os.getpid()}")
        temporary.write_bytes(medium["bytes"])
        temporary.replace(target)
    return f"{folder}/{name}"


def read(
    path: Path,
    media_dir: Path | None = None,
    *,
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    layout: str = "columns",
    columns: dict[str, str] | None = None,
    stream: int | None = None,
    extract: str | None = None,
    prompt: str | None = None,
    audio_as: str = "audio",
) -> Rows:
    """Rows of a data set, one sample an answer.

    split: needed where there are several; subset, revision: the hub's configuration and version; layout, columns, stream,
    extract: see above; prompt: the question where a row of `columns` has none; audio_as: the modality that perceives sounds
    which do not say theirs. UserError: no such data set, split or column, the package `datasets` is not there.
    """
    if layout != "columns" and layout not in _LAYOUTS:
        raise UserError(f"data source 'hf': unknown layout '{layout}'{nearest(layout, ['columns', *_LAYOUTS])}")
    table = _opened(path, split, subset, revision, stream)
    if not len(table):
        raise UserError(f"{path}: holds no rows")
    files = media_dir or path.parent, _extraction(extract)
    if layout == "columns":
        taken = (columns or {}).values()
        own = {name: name for name in MEDIA if name in table.column_names and name not in taken}
        names = chosen("columns", columns, _COLUMNS | own)
        if prompt and "question" not in {**(columns or {}), **table.features}:
            names["question"] = ""
        _check_columns(path, table, {**names, "id": ""}, prompt)
        parse = partial(_parse_columns, names=names, prompt=prompt, audio_as=audio_as)
        return Rows(path, _Table(table, None, *files), parse)
    if columns or prompt:
        given = "columns" if columns else "prompt"
        raise UserError(f"data source 'hf': `{given}` belongs to layout: columns, found layout: {layout}")
    chosen_layout = _LAYOUTS[layout](audio_as=audio_as)
    return Rows(path, _Table(table, chosen_layout, *files), partial(_parse_talk, layout=chosen_layout))


def _opened(path: Path, split: str | None, subset: str | None, revision: str | None, stream: int | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data source 'hf' needs the package `datasets`: uv sync --extra datasets (or pip install datasets)"
        ) from None
    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            source = _source(path, subset, revision, split)
            found = datasets.load_dataset(**source, split=split, streaming=stream is not None)
        table = _without_decoding(_one_split(path, found, split))
        return table if stream is None else _fetched(table, stream)
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such file, no network, a broken file, an unknown split
        raise UserError(
            f"{path}: `datasets` cannot open it ({first_line(error)}); expected a folder of save_to_disk, "
            f"{', '.join(_FILES)} files, or a data set's name on the hub (which needs the network, or a downloaded copy)"
        ) from error


def _source(path: Path, subset: str | None, revision: str | None, split: str | None) -> dict[str, Any]:
    """What `load_dataset` is told of one file, a folder, or a name on the hub."""
    if path.is_file():
        if (kind := _FILES.get(path.suffix.lower())) is None:
            raise UserError(f"{path}: is no file that `datasets` reads as a table; known: {', '.join(_FILES)}")
        if subset is not None:
            raise UserError(f"{path}: is one file, which has no subset '{subset}'; leave the option out")
        return {"path": kind, "data_files": [str(path)], **_as_texts(kind, path)}
    if subset is None and path.is_dir() and (tables := _tables(path, split)):
        return tables
    return {"path": path.as_posix(), "name": subset, "revision": revision}


def _tables(folder: Path, split: str | None) -> dict[str, Any]:
    """The tables of one kind that lie in a folder, by split; none where it describes itself, or its media have a table.

    split: the others' files are left out, which may have other columns (a test split without answers). `datasets` itself
    would take a folder with more pictures than tables for one of pictures alone.
    """
    card = folder / "README.md"
    if card.is_file() and re.search(r"^(configs|dataset_info):", card.read_text(errors="replace"), re.MULTILINE):
        return {}
    there = {file.suffix.lower() for file in folder.rglob("*") if file.stem != "metadata"}
    suffix = next((suffix for suffix in _FILES if suffix in there), None)
    if suffix is None:
        return {}
    files = _by_split(folder, suffix)
    files = {split: files[split]} if split in files else files
    return {"path": _FILES[suffix], "data_files": files, **_as_texts(_FILES[suffix], next(iter(files.values()))[0])}


def _as_texts(kind: str, file: str | Path) -> dict[str, Any]:
    """What makes `datasets` leave a csv's cells as they stand: else "007" becomes 7, and "None" nothing."""
    if kind != "csv":
        return {}
    import pandas
    from datasets import Features, Value

    names = pandas.read_csv(file, nrows=0).columns  # by the parser that `datasets` uses, which renames double ones
    return {"keep_default_na": False, "features": Features({name: Value("string") for name in names})}


def _by_split(folder: Path, suffix: str) -> dict[str, list[str]]:
    """Files by the split that `datasets` reads in their names."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = str(folder.absolute())
    found = DataFilesDict.from_patterns(get_data_patterns(base), base, allowed_extensions=[suffix])
    kept = {str(split): [file for file in files if Path(file).stem != "metadata"] for split, files in found.items()}
    return {split: files for split, files in kept.items() if files}


def _one_split(path: Path, found: Any, split: str | None) -> Any:
    if not isinstance(found, dict):
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise UserError(f"{path}: set the option `split`; found '{split}'{nearest(str(split), found)}")
    return found[split]


def _fetched(stream: Any, rows: int) -> Any:
    """The first rows of a stream as a table on disk."""
    import datasets

    taken = stream.take(rows)
    return datasets.Dataset.from_generator(_each, gen_kwargs={"rows": taken}, features=taken.features)


def _each(rows: Any) -> Any:
    yield from rows


def _extraction(folder: str | None) -> str | None:
    if folder is None:
        return None
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise UserError(f"data source 'hf': extract must be a folder below media_dir, found {folder!r}")
    return folder.rstrip("/")


def _is_media(feature: Any) -> bool:
    """Whether a column holds media, or lists of them, as `datasets` knows them: pictures, sounds, videos."""
    return type(getattr(feature, "feature", feature)).__name__ in _MEDIA


def _without_decoding(table: Any) -> Any:
    """Media, wherever they stand, as {"path", "bytes"}: files are decoded by data/media.py, in one way for all formats."""
    for column, feature in (table.features or {}).items():
        plain = _undecoded(feature)
        if plain != feature:
            table = table.cast_column(column, plain)
    return table


def _undecoded(feature: Any) -> Any:
    """A column's type, its media left as they are stored."""
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return dataclasses.replace(feature, decode=False) if _is_media(feature) else feature


def _check_columns(path: Path, table: Any, names: dict[str, str], prompt: str | None) -> None:
    if not names["answer"] or not (names["question"] or prompt):
        raise UserError(
            f"{path}: a row wants a question and an answer; set options: {{columns: {{question: ..., answer: ...}}}}, or "
            "{prompt: TEXT} where all rows ask the same"
        )
    for known, column in names.items():
        if column and column not in table.column_names:
            raise UserError(
                f"{path}: has no column '{column}' ({columns_of(dict.fromkeys(table.column_names), column)}); set "
                f"options: {{columns: {{{known}: ...}}}}"
                + (", or {prompt: TEXT} where all rows ask the same" if known == "question" else "")
            )


def _parse_talk(record: tuple[dict[str, Any], int], index: int, layout: Layout) -> Sample:
    row, turn = record
    return sample_of(row, index, turn, str(index), layout)


def _parse_columns(
    record: tuple[dict[str, Any], int], index: int, names: dict[str, str], prompt: str | None, audio_as: str
) -> Sample:
    row, _ = record
    media = []
    for name, (kind, modality) in (MEDIA | {"audio": ("audio", audio_as)}).items():
        value = row.get(names[name]) if names[name] else None
        media += [Media(kind, path_of(entry, names[name]), modality) for entry in entries_of(value)]
    instruction = text_of(row, names["instruction"]) if names["instruction"] else None
    asked = row.get(names["question"]) if names["question"] else None
    question = prompt if prompt and (asked is None or not str(asked).strip()) else text_of(row, names["question"])
    return Sample(
        id=str(index if row.get(names["id"]) in (None, "") else row[names["id"]]),
        messages=ask(media, question, text_of(row, names["answer"]), instruction),
        source="hf",
        row=index,
        meta={key: value for key, value in row.items() if key not in names.values()},
    )
