"""Yes/no questions about objects in pictures of the miniature world, as in POPE (Li et al. 2023).

File: SPLIT/images.jsonl (messages rows); media: SPLIT/images/*.png. Scored as in yes_no.py; the truth is balanced, so
that the yes-ratio should be 0.5.
"""

from __future__ import annotations

from eval.benchmarks.yes_no import YesNo


class MiniworldImages(YesNo):
    name = "miniworld_images"
    source = "messages"
    home = ""
