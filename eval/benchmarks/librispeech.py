"""LibriSpeech (Panayotov et al. 2015): read English speech; word error rate after Whisper's text normaliser.

Folder, as published (openslr.org/12, test-clean.tar.gz and others), a split or the whole LibriSpeech:

    LibriSpeech/test-clean/1089/134686/1089-134686.trans.txt    lines `1089-134686-0000 HE HOPED THERE WOULD BE STEW ...`
    LibriSpeech/test-clean/1089/134686/1089-134686-0000.flac

Path and media folder: the same folder. Recordings of one chapter share a speaker, so the chapter is what the bootstrap
draws. Scored as in transcription.py.

lmms-eval 0.7.3 (tasks librispeech_*) applies Whisper's basic normaliser after the English one, which drops `$` and `%` and
makes two words of `2.5`; on texts without such signs its rate is ours (times 100).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.schema import BadSample, Media, Sample, UserError
from eval.benchmarks.base import Row
from eval.benchmarks.fields import Fields
from eval.benchmarks.questions import ask
from eval.benchmarks.transcription import QUESTION, Asr


class LibriSpeech(Asr):
    name = "librispeech"
    home = (
        "get test-clean.tar.gz (or another split) from openslr.org/12, unpack it, and name the folder "
        "LibriSpeech/test-clean as path and as media folder"
    )

    def records(self, path: Path) -> list[Any]:
        if not path.is_dir():
            raise UserError(f"{path}: is a file; {self.home}")
        lines = [
            (text.parent.relative_to(path).as_posix(), line)
            for text in sorted(path.rglob("*.trans.txt"))
            for line in text.read_text(encoding="utf-8", errors="replace").split("\n")
            if line.strip()
        ]
        if not lines:
            raise UserError(f"{path}: holds no *.trans.txt; {self.home}")
        return lines

    def prompt(self, record: Any, index: int) -> Sample:
        folder, line = record
        name, _, words = line.strip().partition(" ")
        if not words:
            raise BadSample(f"expected `ID WORDS`, found {line[:60]!r}")
        path = f"{folder}/{name}.flac"
        media, meta = [Media("audio", path, "speech")], {"audio": path, "video_id": chapter(name)}
        return ask(name, QUESTION, words.strip(), media, index=index, source=self.name, meta=meta)

    def from_record(self, fields: Fields, index: int) -> Row:
        row = super().from_record(fields, index)
        row.unit = fields.unit or chapter(Path(fields.media).stem or row.id)
        return row


def chapter(name: str) -> str:
    """SPEAKER-CHAPTER of SPEAKER-CHAPTER-NUMBER."""
    return name.rpartition("-")[0] or name
