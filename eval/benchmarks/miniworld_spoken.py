"""Spoken questions of the miniature world: the question exists in the sound only, the answer is a word or two.

File: SPLIT/spoken.jsonl (messages rows); media: SPLIT/speech/*.wav and what the question is about.
"""

from __future__ import annotations

from eval.benchmarks.short_answer import ShortAnswer


class MiniworldSpoken(ShortAnswer):
    name = "miniworld_spoken"
    source = "messages"
