"""Questions of the miniature world in text alone: a scene told in words, then one of MUSIC-AVQA's nine kinds of question.

File: SPLIT/told.jsonl (messages rows); no media.
"""

from __future__ import annotations

from eval.benchmarks.short_answer import TypedShortAnswer


class MiniworldTold(TypedShortAnswer):
    name = "miniworld_told"
    source = "messages"
