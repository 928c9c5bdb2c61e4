"""Rows that put different modalities on the two ranks of every micro batch, in one file of messages.

    position p of the line of rows is taken by rank p % 2 (batch 1 on two ranks), and by one rank with batch 2 in one piece

So the file is written in the order that undoes mokamm.training.stream's drawing. Media are those of a miniature world.
Answers have between 1 and some 60 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.order import epoch_order

# (rank 0, rank 1); v video, a sound, s speech, i image, nothing: text only
PAIRS = [
    ("v", "a"),  # rank 0 without sound, rank 1 without a picture
    ("", "va"),
    ("iii", "s"),  # three clips against one
    ("aa", ""),
    ("", ""),  # no media anywhere
    ("va", "i"),
    ("s", "vvi"),
    ("i", "as"),
]
ANSWERS = [
    "yes",
    "two",
    "the flute plays first and the drum joins it, then both fall silent and the bell is left alone",
]


def write_rows(world: Path, number: int, seed: int = 0, file: str = "mixed.jsonl") -> Path:
    """`number` rows below a split of the miniature world; they come in the order of PAIRS in the first epoch of `seed`."""
    lines: list[str] = [""] * number
    files = {
        "v": sorted((world / "videos").iterdir()), "a": sorted((world / "audio").iterdir()),
        "s": sorted((world / "speech").iterdir()), "i": sorted((world / "images").iterdir()),
    }  # fmt: skip
    for position, row in enumerate(epoch_order(number, 0, seed)):
        pair, rank = divmod(position, 2)
        wanted = PAIRS[pair % len(PAIRS)][rank]
        media = [_part(kind, files[kind][(position + k) % len(files[kind])], world) for k, kind in enumerate(wanted)]
        question = {"type": "text", "text": f"What is there, and what is number {position}?"}
        answer = ANSWERS[(position * 5 + pair) % len(ANSWERS)]
        messages = [{"role": "user", "content": [*media, question]}, {"role": "assistant", "content": answer}]
        lines[int(row)] = json.dumps({"id": f"p{position}", "messages": messages})
    path = world / file
    path.write_text("\n".join(lines) + "\n")
    return path


def _part(kind: str, file: Path, world: Path) -> dict[str, Any]:
    part = {"type": {"v": "video", "i": "image"}.get(kind, "audio"), "path": file.relative_to(world).as_posix()}
    return {**part, "as": "speech"} if kind == "s" else part
