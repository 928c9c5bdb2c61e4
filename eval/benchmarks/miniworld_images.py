"""Yes/no questions about objects in pictures of the miniature world, as in POPE (Li et al. 2023).

File: SPLIT/images.jsonl (messages rows); media: SPLIT/images/*.png. Scored as in yes_no.py; the truth is balanced, so
that the yes-ratio should be 0.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.sources import open_source
from data.sources.rows import Rows
from eval.benchmarks.yes_no import YesNo


class MiniworldImages(YesNo):
    name = "miniworld_images"
    source = "messages"
    home = ""

    def open(self, path: Path, **options: Any) -> Rows:
        return open_source(self.source, path, **options)
