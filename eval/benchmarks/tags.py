"""What of a text is the answer: between tags, as the published audio-visual models give it, <answer> two </answer>; in
a box, as mathematical ones do, \\boxed{two}; after its thoughts, as reasoning models do, <think> ... </think> two."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\boxed\{\s{0,9}(?:\\text\{)?([^{}]{0,2000})\}")


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


def after_thoughts(text: str) -> str:
    """A text without the thoughts that end in </think>; nothing of it counts where they were cut off before their end."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def marked(text: str) -> str:
    """What stands in the last <answer>...</answer>, and in it, or in the text, in the last \\boxed{...}; else the text."""
    text = (tagged(text, "answer") or [text])[-1]
    return (_BOX.findall(text) or [text])[-1]
