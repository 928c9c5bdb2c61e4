"""Word error rates after Whisper's normaliser, and CIDEr-D, each against plain re-computations."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import BENCHMARKS
from eval.benchmarks.cider import cider_d, tokens
from eval.benchmarks.whisper_text import whisper_normalised
from eval.score import score


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- speech ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's twenty-three colours, Mr. Smith!", "it is 23 colors mister smith"),
        ("uh, [noise] I won't (cough) go", "i will not go"),
        ("unclosed [bracket and (another", "unclosed bracket and another"),
        ("café", "cafe"),
        ("", ""),
        ("   ", ""),
    ],
)
def test_whispers_normaliser(text: str, expected: str) -> None:
    assert whisper_normalised(text) == expected


def test_an_hour_of_speech_is_normalised_whole() -> None:
    talk = ["it's twenty-two colours ", "mr. smith won't go "] * 1400
    assert whisper_normalised("".join(talk)) == " ".join(["it is 22 colors", "mister smith will not go"] * 1400)


def test_diacritics_of_other_languages_stay() -> None:
    assert whisper_normalised("Café, (äh) schön!", english=False) == "café schön"


def test_it_equals_transformers_own() -> None:
    """With the same table of spellings, on texts of ordinary length."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    import eval.benchmarks.whisper_text as module

    table = json.loads(Path(module.__file__).with_name("whisper_spelling.json").read_text())
    english, basic = EnglishTextNormalizer(table), BasicTextNormalizer()
    generator = random.Random(1)
    text = "the grey cat's [x] two hundred and five (oh) 3,5 $4.50 won't uh neighbour 1st é 20% one"
    words = text.split()
    for _ in range(200):
        text = " ".join(generator.choices(words, k=generator.randint(1, 15)))
        assert whisper_normalised(text) == " ".join(english(text).split())
        assert whisper_normalised(text, english=False) == " ".join(basic(text).split())


@pytest.mark.parametrize("text", ["<" * 10**6, "(" * 10**6, "x" + " " * 10**6 + "y", "9" * 10**6, "[a" * 300_000])
def test_long_texts_are_normalised_in_linear_time(text: str) -> None:
    whisper_normalised(text)  # the patterns alone would take hours


def test_word_errors_over_the_whole_set(tmp_path: Path) -> None:
    rows = [
        {
            "audio_filepath": "a.wav",
            "text": "He hoped, there's twenty colours",
            "pred_text": "he hoped there is 20 colors",
        },
        {"audio_filepath": "b.wav", "text": "red green blue", "pred_text": "red blue"},  # one of three
        {"audio_filepath": "c.wav", "text": "be quiet please", "pred_text": ""},  # three of three
        {"audio_filepath": "c.wav", "text": "be quiet please", "pred_text": "be quiet please"},  # the same row again
        {
            "audio_filepath": "d.wav",
            "text": "Guten Tag, Welt",
            "pred_text": "guten tag",
            "language": "de",
        },  # one of three
    ]
    result = score("asr", write(tmp_path / "p.jsonl", rows))
    strict = result["rules"]["strict"]
    assert strict["wer"] == strict["score"] == pytest.approx((0 + 1 + 3 + 1) / (6 + 3 + 3 + 3))
    assert (result["parsed"], result["unparsed"], result["duplicates"]) == (3, 1, 1)
    letters = (
        len("he hoped there is 20 colors") + len("red green blue") + len("be quiet please") + len("guten tag welt")
    )
    assert strict["cer"] == pytest.approx((0 + 6 + 15 + 5) / letters)
    assert result["rules"]["official"]["wer"] == pytest.approx((0 + 1 + 3 + 0 + 1) / (6 + 3 + 3 + 3 + 3))
    assert "lower is better" in result["measure"]


@pytest.mark.parametrize("key", ["language", "lang"])
@pytest.mark.parametrize(
    ("language", "english"),
    [("en", True), ("en-US", True), ("en_GB", True), ("EN", True), ("eng", True), ("English", True), ("", True),
     ("de", False), ("enm", False), ("es-EN", False)],
)  # fmt: skip
def test_english_by_all_its_names_is_normalised_as_english(
    key: str, language: str, english: bool, tmp_path: Path
) -> None:
    row = {"audio_filepath": "a.wav", "text": "twenty colours", key: language}
    said = row | {"pred_text": "20 colors"}
    annotations = write(tmp_path / "m.jsonl", [row])
    for truths in (None, annotations):
        assert score("asr", write(tmp_path / "p.jsonl", [said]), truths)["score"] == (0 if english else 1)
    (own,) = BENCHMARKS["asr"].load(annotations)
    own.prediction = "20 colors"
    assert BENCHMARKS["asr"].score([own])["score"] == (0 if english else 1)


def test_words_heard_in_silence_are_errors(tmp_path: Path) -> None:
    """As jiwer counts them over a set; only a row without the key is bad."""
    import jiwer

    pairs = [("a b", "a"), ("", "x y"), ("", "")]
    rows = [{"audio_filepath": f"{i}.wav", "text": true} for i, (true, _) in enumerate(pairs)]
    said = [row | {"pred_text": heard} for row, (_, heard) in zip(rows, pairs, strict=True)]
    expected = jiwer.process_words([true for true, _ in pairs], [heard for _, heard in pairs]).wer
    annotations = write(tmp_path / "m.jsonl", rows)
    own = BENCHMARKS["asr"].load(annotations)
    for row, (_, heard) in zip(own, pairs, strict=True):
        row.prediction = heard
    assert [BENCHMARKS["asr"].correct(row) for row in own] == [False, False, True]
    ours = write(tmp_path / "own.jsonl", [BENCHMARKS["asr"].to_json(row) for row in own])
    published = write(tmp_path / "p.jsonl", said)
    for predictions, truths in ((published, None), (published, annotations), (ours, None), (ours, annotations)):
        result = score("asr", predictions, truths)
        assert [result["rules"][rule]["score"] for rule in ("strict", "official")] == [expected, expected] == [1.5, 1.5]
        assert (result["bad"], result["rules"]["strict"]["exact"]) == (0, pytest.approx(1 / 3))
    del said[1]["text"]
    assert score("asr", write(tmp_path / "q.jsonl", said))["bad"] == 1


@pytest.mark.parametrize(("name", "worst"), [("asr", 1), ("miniworld_transcription", 0)])
def test_rows_that_cannot_be_read_are_no_perfect_transcripts(name: str, worst: int, tmp_path: Path) -> None:
    """A file of another format: nobody knows the words, of which none was recognised."""
    rows = BENCHMARKS[name].load(write(tmp_path / "m.jsonl", [{"question": "?", "answer": 1}] * 3))
    result = BENCHMARKS[name].score(rows)
    assert (result["bad"], result["score"], result["interval"]) == (3, worst, [worst, worst])
    assert [result["metrics"][figure] for figure in ("wer", "cer", "exact")] == [1, 1, 0]


# ---- captions --------------------------------------------------------------------------------------------------------


def cider_by_loops(candidates: list[str], references: list[list[str]]) -> list[float]:
    """The definition, sum by sum: no Counter, no sharing of work."""

    def grams(caption: str, n: int) -> list[tuple[str, ...]]:
        words = caption.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def weight(gram: tuple[str, ...], caption: str) -> float:
        count = grams(caption, len(gram)).count(gram)
        clips = sum(any(gram in grams(r, len(gram)) for r in captions) for captions in references)
        return count * (math.log(len(references)) - math.log(max(1, clips)))

    def likeness(one: str, other: str, n: int) -> float:
        mine, theirs = set(grams(one, n)), set(grams(other, n))
        product = sum(min(weight(g, one), weight(g, other)) * weight(g, other) for g in mine & theirs)
        norms = [
            math.sqrt(sum(weight(g, c) ** 2 for g in gs)) for g_c in [(mine, one), (theirs, other)] for gs, c in [g_c]
        ]
        if not norms[0] * norms[1]:
            return 0.0
        difference = len(grams(one, 2)) - len(grams(other, 2))
        return product / (norms[0] * norms[1]) * math.exp(-(difference**2) / 72)

    return [
        10 * sum(likeness(c, r, n) for r in own for n in (1, 2, 3, 4)) / 4 / len(own)
        for c, own in zip(candidates, references, strict=True)
    ]


def test_cider_equals_loops() -> None:
    generator = random.Random(0)
    text = "a dog barks and the man speaks while birds chirp in wind"
    words = text.split()

    def caption() -> str:
        return " ".join(generator.choices(words, k=generator.randint(1, 12)))

    references = [[caption() for _ in range(generator.randint(1, 5))] for _ in range(12)]
    candidates = [generator.choice(own) if i % 2 else caption() for i, own in enumerate(references)]
    candidates[0] = ""
    candidates[1] = " ".join([references[1][0], *generator.choices(words, k=35)])  # far too long, and worth a little
    found = cider_d(candidates, references)
    assert 0 < found[1] < 1e-2
    assert found == pytest.approx(cider_by_loops(candidates, references))


def test_cider_of_coco_caption() -> None:
    """Figures of pycocoevalcap 1.2 (its Cider alone needs no Java) on the same captions."""
    references = [
        ["a dog barks loudly", "a dog is barking in the distance"],
        ["rain falls on a roof", "heavy rain and thunder"],
        ["a man speaks and a dog barks", "a man is speaking"],
    ]
    found = cider_d(["a dog is barking loudly", "rain falls and thunder", "a man speaks"], references)
    assert found == pytest.approx([3.048683699524414, 2.320069625213683, 3.1887221857410393])


def test_tokens() -> None:
    assert tokens("It's a Dog, barking.") == ("it", "'s", "a", "dog", "barking")
    assert tokens("They don't hum — 3.5 hum-like “notes”") == ("they", "do", "n't", "hum", "3.5", "hum-like", "notes")
    for clitic in ("'s", "'m", "'d", "'re", "'ve", "'ll"):
        assert tokens(f"We{clitic} barking, we\u2019ll") == ("we", clitic, "barking", "we", "'ll")
    assert tokens("собака лает!") == ("собака", "лает")
    assert tokens("...") == ()


def test_captions_in_a_file(tmp_path: Path) -> None:
    references = [["A dog barks.", "Barking dog"], ["Rain falls"], ["A man speaks"]]
    said = ["a dog barks", "", "A man speaks!"]
    rows = [
        {"youtube_id": f"y{i}", "references": r, "prediction": p}
        for i, (r, p) in enumerate(zip(references, said, strict=True))
    ]
    result = score("audiocaps", write(tmp_path / "p.jsonl", rows))
    plain = [[" ".join(tokens(c)) for c in own] for own in references]
    expected = cider_by_loops(["a dog barks", "", "a man speaks"], plain)
    assert result["score"] == pytest.approx(sum(expected) / 3)
    assert (result["parsed"], result["unparsed"], result["scale"]) == (2, 1, "points")
    for key in ("captions", "caption", "answer"):
        other = [
            {"youtube_id": f"y{i}", key: [*r, " ", None], "prediction": p}
            for i, (r, p) in enumerate(zip(references, said, strict=True))
        ]
        assert score("audiocaps", write(tmp_path / "o.jsonl", other))["score"] == result["score"]
    assert score("audiocaps", write(tmp_path / "o.jsonl", rows + rows[:1]))["duplicates"] == 1
    (tmp_path / "test.csv").write_text(
        "youtube_id,start_time,caption\n" + "".join(f"y{i},0,{c}\n" for i, own in enumerate(references) for c in own)
    )
    bare = [{"audio_id": f"clips/y{i}.wav", "caption": p} for i, p in enumerate(said)]
    again = score("audiocaps", write(tmp_path / "q.jsonl", bare), tmp_path / "test.csv")
    assert again["score"] == pytest.approx(result["score"])
    test = score("audiocaps", tmp_path / "p.jsonl", tmp_path / "test.csv", against=tmp_path / "q.jsonl")["against"]
    assert (test["difference"], test["rows"]) == (0.0, 3)


@pytest.mark.parametrize("key", ["references", "caption", "answer", "reference"])
def test_one_reference_may_be_a_text(key: str, tmp_path: Path) -> None:
    told, said = ["a dog barks", "rain falls", "a man speaks"], ["a dog barks", "rain", "..."]
    rows = [{"youtube_id": f"y{i}", key: t, "prediction": p} for i, (t, p) in enumerate(zip(told, said, strict=True))]
    result = score("audiocaps", write(tmp_path / "p.jsonl", rows))
    expected = cider_by_loops([*said[:2], ""], [[caption] for caption in told])
    assert (result["score"], result["unparsed"]) == (pytest.approx(sum(expected) / 3), 1)
    table = "".join(f"y{i},{t}\ny{i},another\n" for i, t in enumerate(told))
    (tmp_path / "test.csv").write_text(f"youtube_id,caption\n{table}")
    assert score("audiocaps", tmp_path / "p.jsonl", tmp_path / "test.csv")["problems"] == []  # one in common is enough


def test_clips_are_found_by_every_name_that_they_have(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n7,-ab,30,A dog barks\n8,-ab,30,Barking\n9,cd,0,Rain falls\n"
    )
    said = ["a dog barks", "rain falls"]
    expected = sum(cider_d(said, [["A dog barks", "Barking"], ["Rain falls"]])) / 2
    rows = BENCHMARKS["audiocaps"].load(tmp_path / "test.csv", options={"name": "Y{youtube_id}.wav"})
    for row, text in zip(rows, said, strict=True):
        row.prediction = text
    plain = BENCHMARKS["audiocaps"].strict(rows)
    assert BENCHMARKS["audiocaps"].earnings(rows) == [f"CIDEr-D {one.points:.2f}" for one in plain]
    rows[0].prediction = "<think>Rain?</think>A dog barks"
    assert BENCHMARKS["audiocaps"].strict(rows) == plain
    rows[0].error = "the file is broken"
    assert [one.points for one in BENCHMARKS["audiocaps"].strict(rows)] == [0.0, plain[1].points]
    rows[0].error = None
    records = [BENCHMARKS["audiocaps"].to_json(row) for row in rows]
    assert [(row["points"], row["of"], row["correct"]) for row in records] == [(None, None, None)] * 2
    found = [score("audiocaps", write(tmp_path / "own.jsonl", records), tmp_path / "test.csv")]
    for key, names in (("audiocap_id", (7, 9)), ("audiocap_id", ("8", "9")), ("audio_id", ("Y-ab.wav", "Ycd"))):
        records = [{key: name, "caption": text} for name, text in zip(names, said, strict=True)]
        found.append(score("audiocaps", write(tmp_path / "p.jsonl", records), tmp_path / "test.csv"))
    assert [result["score"] for result in found] == pytest.approx([expected] * 4)
    assert [result["problems"] for result in found] == [[]] * 4


def test_a_caption_of_any_length_is_scored() -> None:
    rows = BENCHMARKS["audiocaps"].score([])
    assert rows["score"] == 0.0
    long = cider_d(["dog " * 300_000, "rain"], [["a dog"], ["rain"]])
    assert long[0] == 0.0
    assert long[1] == pytest.approx(2.5)
    long = " ".join(f"word{k}" for k in range(300))  # the very words of one reference of two, far from the other
    assert cider_d([long, "rain"], [["a dog", long], []]) == pytest.approx([5.0, 0.0])
