"""The page of examples: real media become pictures, any answer stays text, the choice is fixed."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.media import MediaLoader
from data.schema import Media
from eval.benchmarks import BENCHMARKS, Row
from eval.examples import LETTERS, SHOWN, Subject, by_kind, choose, page, write_examples
from eval.thumbnails import HEIGHT, SOUND_WIDTH, sound_picture, thumbnail

ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "article", "figure", "figcaption", "img",
    "dl", "dt", "dd", "i",
}  # fmt: skip
STRANGE = {
    "markup": "</dd></article><script>alert('x')</script><img src=x onerror=alert(1)> &amp; **bold** | a | b |\n# head",
    "script": "二つの鐘 две трубы شجرتان 🔔\u200d🔔",
    "control": "a\0b\x1b[31mred\rback\u202eright to left",
    "million": "ha" * 500_000,
    "empty": "",
    "halves": "\ud800 and \udfff",
}


class Reader(HTMLParser):
    """Tags that were opened, what is still open, and the text of each dd."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "dd":
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "dd" in self.open:
            self.texts[-1] += data


def rows_of(folder: Path) -> list[Row]:
    return BENCHMARKS["miniworld_avqa"].load(folder / "avqa.json")


def subject(rows: list[Row], control: str | None = None) -> Subject:
    benchmark = BENCHMARKS["miniworld_avqa"]
    return Subject(benchmark, benchmark.name, control, benchmark.score(rows))


@pytest.mark.parametrize("kind", STRANGE)
def test_any_answer_stays_text(small_world: Path, kind: str, tmp_path: Path) -> None:
    rows = rows_of(small_world)[:2]
    rows[0].prediction = rows[1].meta["asked"] = STRANGE[kind]
    path = tmp_path / "report" / "page.html"
    write_examples(path, subject(rows), rows, MediaLoader(small_world))
    content = path.read_bytes()
    assert len(content) < 300_000
    reader = Reader()
    reader.feed(content.decode("utf-8"))
    assert set(reader.tags) <= ALLOWED
    assert reader.open == []
    assert reader.tags.count("article") == 2
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", content.decode())
    answer = next(text for text in reader.texts if text.startswith(STRANGE[kind][:1]) or kind in ("empty", "halves"))
    if kind in ("markup", "script"):
        assert answer == STRANGE[kind]
    if kind == "million":
        assert answer == "ha" * (LETTERS // 2) + f" … ({1_000_000 - LETTERS:,} more characters)"
    if kind == "control":
        assert answer == "a\u2400b\u241b[31mred\u240dback\\u202eright to left"


def test_media_are_shown_and_what_cannot_be_opened_is_said(small_world: Path) -> None:
    rows = rows_of(small_world)
    rows[0].prediction = rows[0].answer
    rows[6].error = "videos/3.mp4: the file is cut off"
    text = page(subject(rows), rows, MediaLoader(small_world))
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", text)]
    assert len(pictures) == 2 * 8 - 2  # video and sound of each row; that of the last clip is cut off
    for picture in pictures:
        assert Image.open(io.BytesIO(picture)).height == HEIGHT
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        f"Wrong: {SHOWN} of 6", "Right: 1 of 1", "Unusable: 1 of 1",
    ]  # fmt: skip
    assert "videos/3.mp4" in text
    assert text == page(subject(rows), rows, MediaLoader(small_world))


def test_the_choice_is_drawn_by_the_seed_and_covers_the_file() -> None:
    benchmark = BENCHMARKS["yes_no"]
    rows = [Row(id=str(i), index=i, answer="yes", prediction="yes" if i % 3 else "no") for i in range(300)]
    first, again, other = (choose(by_kind(benchmark, rows), seed) for seed in (0, 0, 1))
    assert first == again != other
    for kind, wanted in (("right", True), ("wrong", False)):
        assert len(first[kind]) == SHOWN
        assert all(bool(row.index % 3) == wanted for row in first[kind])
        assert [row.index for row in first[kind]] == sorted(row.index for row in first[kind])
    assert first["wrong"][-1].index > 100  # not the first rows


def test_a_caption_is_neither_right_nor_wrong_and_is_scored_over_the_set(tmp_path: Path) -> None:
    benchmark, said = BENCHMARKS["audiocaps"], ["a dog barks loudly", "rain"]
    metas = [{"references": ["a dog barks loudly"]}, {"references": ["heavy rain falls down"]}]
    rows = [Row(str(i), i, prediction=p, meta=m) for i, (p, m) in enumerate(zip(said, metas, strict=True))]
    text = page(Subject(benchmark, "audiocaps", None, benchmark.score(rows)), rows, MediaLoader(tmp_path))
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Scored: 2 of 2"]
    assert "CIDEr-D 10.00" in text


def test_words_that_were_misheard_are_errors(tmp_path: Path) -> None:
    benchmark = BENCHMARKS["asr"]
    rows = [Row("a", 0, answer="red green blue", prediction="cat dog cow")]
    text = page(Subject(benchmark, "asr", None, benchmark.score(rows)), rows, MediaLoader(tmp_path))
    assert '<dt>errors</dt><dd dir="auto">3 of 3</dd>' in text


def test_a_control_says_what_was_shown(small_world: Path) -> None:
    rows = rows_of(small_world)[:2]
    for control, words in (("blind", "no media were shown"), ("shuffle", "another row"), ("adapter:audio", "was off")):
        assert words in page(subject(rows, control), rows, MediaLoader(small_world))


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_a_tone_is_a_line_at_its_height_and_silence_is_dark() -> None:
    time = np.arange(32000) / 16000
    heights = []
    for pitch in (1000.0, 4000.0, 7000.0):
        picture = sound_picture((0.5 * np.sin(2 * np.pi * pitch * time)).astype(np.float32))
        assert picture.shape == (HEIGHT, SOUND_WIDTH, 3)
        spectrogram = picture[: HEIGHT - HEIGHT // 3].astype(int).sum(-1)
        heights.append(int(spectrogram[:, 100:-100].mean(1).argmax()))
    rows = HEIGHT - HEIGHT // 3
    assert heights == pytest.approx([rows * (1 - pitch / 8000) for pitch in (1000.0, 4000.0, 7000.0)], abs=2)
    silent = sound_picture(np.zeros(100, dtype=np.float32))
    assert silent[: HEIGHT - HEIGHT // 3].max() < 10
    assert sound_picture(np.zeros(0, dtype=np.float32)).shape == (HEIGHT, SOUND_WIDTH, 3)


def test_wide_and_tiny_pictures(tmp_path: Path) -> None:
    for size in ((1900, 20), (1, 1), (20, 1900)):
        Image.new("RGB", size, "red").save(tmp_path / "a.png")
        jpeg, what = thumbnail(Media("image", "a.png", "vision"), MediaLoader(tmp_path))
        shown = Image.open(io.BytesIO(jpeg))
        assert (shown.height, what) == (HEIGHT, "picture")
        assert shown.width <= 3 * HEIGHT + 4
