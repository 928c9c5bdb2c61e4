"""Whisper's text normaliser (Radford et al. 2022, appendix C), as transformers carries it.

English texts go through EnglishTextNormalizer: contractions, numbers as digits, British spellings as American ones,
no fillers (`uh`), no brackets with what stands in them, no diacritics; other languages through BasicTextNormalizer: lower
case, no punctuation, symbols or brackets, diacritics as they are. whisper_spelling.json is the table of spellings that
OpenAI publishes with Whisper (github.com/openai/whisper, whisper/normalizers/english.json, MIT License, Copyright (c)
2022 OpenAI).

The normaliser's own patterns take time that grows with the square of some inputs (a million spaces, brackets that never
close), and it fails on numbers of thousands of digits. So white space is joined first, brackets that never close become
spaces, the English rules apply to the first MOST words (two hours of speech), and a text that they fail on gets
the basic ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

MOST = 20_000


@lru_cache(maxsize=1)
def _normalisers() -> tuple[Callable[[str], str], Callable[[str], str]]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    spelling = json.loads(Path(__file__).with_name("whisper_spelling.json").read_text(encoding="utf-8"))
    return EnglishTextNormalizer(spelling), BasicTextNormalizer()


@lru_cache(maxsize=16384)
def whisper_normalised(text: str, english: bool = True) -> str:
    """The text as Whisper's word error rates see it."""
    words = _closed(text).split()
    rules, plain = _normalisers()
    rules = rules if english else plain
    head, tail = (_closed(" ".join(part)) for part in (words[:MOST], words[MOST:]))  # the cut may open others
    try:
        head = rules(head)
    except (ValueError, ArithmeticError):  # a number that it cannot build
        head = plain(head)
    return " ".join([*head.split(), *plain(tail).split()])


def _closed(text: str) -> str:
    """The text with brackets that no later one closes made spaces, as the normaliser makes all symbols in the end."""
    square = max(text.rfind(">"), text.rfind("]")) + 1
    text = text[:square] + text[square:].replace("<", " ").replace("[", " ")
    round_ = text.rfind(")") + 1
    return text[:round_] + text[round_:].replace("(", " ")
