"""A page of right and wrong examples of an evaluated benchmark: RUN/report/examples/NAME[.CONTROL].html, one file.

For each example the media as the model was shown them, the question, the answer, the truth, and what was earned. Which
rows are shown is drawn by a fixed seed among the right, the wrong and the unusable ones (captions are neither right nor
wrong, but scored), so that the same predictions give the same page. An answer may be anything (markup, control
characters, another script, a million letters): it is escaped, made visible and cut, and stays in its place.

Cost: one decode a medium shown.
"""

from __future__ import annotations

import base64
import html
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.media import MediaLoader
from data.schema import BadSample, Media
from eval.benchmarks import Benchmark, Row
from eval.thumbnails import thumbnail

SEED = 0
SHOWN = 6  # of each kind
LETTERS = 600  # of a text
UNDER = {
    None: "no control: all media were shown",
    "blind": "control blind: no media were shown",
    "shuffle": "control shuffle: the media are those of another row",
    "base": "control base: the model before stage 2",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #1f2328; }
article { border: 1px solid #d0d7de; border-left: 6px solid #8b949e; border-radius: 6px; margin: 1em 0; padding: .6em 1em; }
article.right { border-left-color: #2da44e; } article.wrong { border-left-color: #d9730d; }
figure { display: inline-block; margin: 0 1em .5em 0; } figcaption { color: #59636e; font-size: 85%; }
img { max-width: 100%; } dl { display: grid; grid-template-columns: 6em 1fr; gap: .2em 1em; margin: 0; }
dt { color: #59636e; } dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
h3 { font-size: 100%; margin: 0 0 .5em; } .note { color: #59636e; }
"""


@dataclass(frozen=True)
class Subject:
    """What a page is about."""

    benchmark: Benchmark
    name: str
    control: str | None
    metrics: dict[str, Any]


def write_examples(path: Path, subject: Subject, rows: Sequence[Row], loader: MediaLoader) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(subject, rows, loader), encoding="utf-8", errors="backslashreplace")


def by_kind(benchmark: Benchmark, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The wrong rows, the right ones (or both as scored ones), and those that could not be used."""
    kinds: dict[str, list[Row]] = {"wrong": [], "right": []} if benchmark.right_or_wrong else {"scored": []}
    kinds["unusable"] = []
    for row in rows:
        kind = "scored" if not benchmark.right_or_wrong else "right" if benchmark.correct(row) else "wrong"
        kinds["unusable" if row.error is not None else kind].append(row)
    return kinds


def choose(kinds: dict[str, list[Row]], seed: int = SEED) -> dict[str, list[Row]]:
    """Up to SHOWN rows of each kind, in the order of the file."""
    generator = random.Random(seed)
    drawn = {}
    for kind, found in kinds.items():
        places = generator.sample(range(len(found)), min(SHOWN, len(found)))
        drawn[kind] = [found[place] for place in sorted(places)]
    return drawn


def page(subject: Subject, rows: Sequence[Row], loader: MediaLoader) -> str:
    title = shown(subject.name + (f", control {subject.control}" if subject.control else ""))
    under = UNDER.get(subject.control, f"control {subject.control}: that modality's adapter path was off")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f'<p class="note">{shown(_summary(subject))}; {shown(under)}. Rows drawn with seed {SEED}.</p>',
    ]
    kinds, earnings = by_kind(subject.benchmark, rows), subject.benchmark.earnings(rows)
    earned = {row.index: words for row, words in zip(rows, earnings, strict=True)}
    for kind, chosen in choose(kinds).items():
        if chosen:
            parts.append(f"<h2>{kind.capitalize()}: {len(chosen)} of {len(kinds[kind])}</h2>")
            parts += [_example(subject.benchmark, row, kind, earned[row.index], loader) for row in chosen]
    return "\n".join([*parts, "</body></html>", ""])


def _summary(subject: Subject) -> str:
    metrics = subject.metrics
    times, unit = (100, " %") if metrics["scale"] == "share" else (1, "")
    return f"{metrics['measure']} {times * metrics['score']:.1f}{unit} over {metrics['rows']} rows"


def _example(benchmark: Benchmark, row: Row, kind: str, earned: str, loader: MediaLoader) -> str:
    parsed = benchmark.reading(row)
    lines = {
        "question": row.sample.prompt[-1].text if row.sample else "",
        "answer": row.prediction,
        "truth": row.answer,
        "read as": "(cannot be read)" if parsed is None else str(parsed),
        "errors" if benchmark.lower_is_better else "earned": earned,
        **({"error": row.error} if row.error is not None else {}),
    }
    figures = "".join(_figure(media, loader) for media in (row.sample.media if row.sample else []))
    terms = "".join(f'<dt>{name}</dt><dd dir="auto">{shown(text)}</dd>' for name, text in lines.items())
    heading = f"<h3>row {row.index}: {shown(row.id, 80)}</h3>"
    return f'<article class="{kind}">{heading}{figures}<dl>{terms}</dl></article>'


def _figure(media: Media, loader: MediaLoader) -> str:
    name = shown(media.path, 120)
    try:
        picture, what = thumbnail(media, loader)
    except BadSample as error:
        return f"<figure><figcaption>{name}: {shown(str(error), 200)}</figcaption></figure>"
    data = base64.b64encode(picture).decode()
    image = f'<img alt="{what}" src="data:image/jpeg;base64,{data}">'
    return f"<figure>{image}<figcaption>{shown(media.modality)}, {what}: {name}</figcaption></figure>"


def shown(text: str, letters: int = LETTERS) -> str:
    """Text as HTML: cut, escaped, with control characters and lone halves of pairs made visible."""
    more = len(text) - letters
    visible = "".join(map(_visible, text[:letters]))
    return html.escape(visible) + (f" &hellip; <i>({more:,} more characters)</i>" if more > 0 else "")


def _visible(letter: str) -> str:
    code = ord(letter)
    if letter in "\n\t" or unicodedata.category(letter)[0] != "C" or letter in "\u200c\u200d":  # joiners spell words
        return letter
    return chr(0x2400 + code) if code < 0x20 else f"\\u{code:04x}"
