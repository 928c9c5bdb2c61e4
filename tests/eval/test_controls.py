"""Controls: blind removes all media, shuffle deranges media of the same kinds, adapter:NAME mutes one modality."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.schema import Media, Message, Sample, Text, UserError
from eval.controls import Control, shuffle_media, without_media

MODALITIES = ["text", "vision", "audio", "speech"]


def clip(name: str, question: str = "what?", extra: str | None = None) -> Sample:
    content: list[Text | Media] = [
        Media("video", f"videos/{name}.mp4", "vision"),
        Text("note: "),
        Media("audio", f"audio/{name}.wav", "audio"),
        Text(question, question=True),
    ]
    if extra:
        content.append(Media("audio", extra, "speech"))
    messages = (Message("system", (Text("be brief"),)), Message("user", tuple(content)))
    return Sample(f"{name}-{question}", (*messages, Message("assistant", (Text("yes"),))), meta={"video_id": name})


def picture(*names: str) -> Sample:
    pictures = (Media("image", f"images/{name}.png", "vision") for name in names)
    content = (*pictures, Text("a bell?", question=True))
    return Sample(" ".join(names), (Message("user", content), Message("assistant", (Text("no"),))))


def text_only(name: str) -> Sample:
    return Sample(name, (Message("user", (Text("hello", question=True),)), Message("assistant", (Text("hi"),))))


def test_blind_keeps_the_words_only() -> None:
    sample = without_media(clip("a", "how many?"))
    assert sample.media == []
    assert [message.text for message in sample.messages] == ["be brief", "note: how many?", "yes"]
    assert [part.question for part in sample.messages[1].content if isinstance(part, Text)] == [False, True]
    assert sample.meta == {"video_id": "a"}


def assert_deranged(before: list[Sample], after: list[Sample]) -> None:
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert (old.id, old.meta, old.answer) == (new.id, new.meta, new.answer)
        assert [m.text for m in old.messages] == [m.text for m in new.messages]
        shape = [(p.kind, p.modality) if isinstance(p, Media) else p for m in old.messages for p in m.content]
        assert shape == [(p.kind, p.modality) if isinstance(p, Media) else p for m in new.messages for p in m.content]
        assert {media.path for media in old.media}.isdisjoint(media.path for media in new.media)
    paths = Counter(tuple(media.path for media in sample.media) for sample in before)
    assert paths == Counter(tuple(media.path for media in sample.media) for sample in after)


@given(st.lists(st.integers(1, 4), min_size=8, max_size=12), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_shuffle_exchanges_clips_within_their_kind(questions: list[int], pictures: int) -> None:
    samples = [clip(f"c{i}", f"q{k}") for i, count in enumerate(questions) for k in range(count)]
    samples += [picture(f"p{i}") for i in range(pictures if pictures > 1 else 0)]
    assert_deranged(samples, shuffle_media(samples))


def test_shuffle_keeps_apart_rows_that_share_one_of_their_media() -> None:
    samples = [clip(f"c{i // 3}", f"q{i}", extra=f"speech/{i % 5}.wav") for i in range(30)]
    assert_deranged(samples, shuffle_media(samples))


def test_shuffle_takes_two_pictures_in_the_other_order_for_the_same() -> None:
    samples = [picture(*names) for k in range(4) for names in ((f"a{k}", f"b{k}"), (f"b{k}", f"a{k}"))]
    assert_deranged(samples, shuffle_media(samples))
    with pytest.raises(UserError, match="share one clip or picture"):
        shuffle_media([picture("a", "b"), picture("b", "a")])


def test_shuffle_is_fixed_and_leaves_text_alone() -> None:
    samples = [clip("a"), text_only("t"), clip("b"), clip("c")]
    first = shuffle_media(samples)
    assert first == shuffle_media(samples)
    assert first[1] == samples[1]
    assert_deranged(samples, first)


def test_shuffle_refuses_what_cannot_be_exchanged() -> None:
    with pytest.raises(UserError, match=r"too many of the 3 rows with vision \+ audio share one clip"):
        shuffle_media([clip("a", "1"), clip("a", "2"), clip("b"), text_only("t")])
    with pytest.raises(UserError, match="1 rows"):
        shuffle_media([clip("a")])


def test_adapter_reroutes_one_modality_at_prefill() -> None:
    ids = torch.tensor([[0, 1, 1, 2, 0, -1]])
    batch = {"modality_ids": ids, "attention_mask": torch.ones(1, 6), "key_mask": ids == 0}
    muted = Control.named("adapter:vision", MODALITIES).reroute(batch, MODALITIES)  # type: ignore[arg-type]
    assert muted["modality_ids"].tolist() == [[0, -1, -1, 2, 0, -1]]
    assert ids.tolist() == [[0, 1, 1, 2, 0, -1]]
    assert muted["attention_mask"] is batch["attention_mask"]
    assert muted["key_mask"] is batch["key_mask"]
    assert Control.named("shuffle", MODALITIES).reroute(batch, MODALITIES) is batch  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "suffix", "shown"),
    [
        (None, "", None),
        ("blind", ".blind", "blind"),
        ("base", ".base", "base"),
        ("adapter:audio", ".adapter-audio", "adapter:audio"),
    ],
)
def test_controls_by_name(text: str | None, suffix: str, shown: str | None) -> None:
    control = Control.named(text, MODALITIES)
    assert (control.suffix, control.name) == (suffix, shown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blnd", "no control 'blnd'; did you mean 'blind'"),
        ("adapter", "did you mean 'adapter:NAME'"),
        ("blind:vision", "no control 'blind:vision'"),
        ("adapter:visoin", "no modality 'visoin'; did you mean 'vision'"),
    ],
)
def test_unknown_controls(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Control.named(text, MODALITIES)
