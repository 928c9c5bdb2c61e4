"""Answers between tags, as the published audio-visual models give them: <answer> two </answer>."""

from __future__ import annotations


def tagged(text: str, tag: str) -> list[str]:
    """What stands between <tag> and the next </tag>, stripped, in order. Linear in the letters of the text."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    found: list[str] = []
    position = 0
    while True:
        start = text.find(opening, position)
        end = text.find(closing, start + len(opening)) if start >= 0 else -1
        if end < 0:
            return found
        found.append(text[start + len(opening) : end].strip())
        position = end + len(closing)
