"""lmms-eval's side without lmms-eval: messages, given media, generation settings, and the tasks' files."""

from __future__ import annotations

import io
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.media import MediaLimits, MediaLoader
from data.pictures import picture
from data.schema import BadSample, Media, MediaError, Text, UserError
from eval.benchmarks import BENCHMARKS
from eval.lmms.decoding import Decoding
from eval.lmms.media import GivenMedia, kind_of
from eval.lmms.messages import messages_of, sample_of, user_turn

ROOT = Path(__file__).resolve().parents[2]


def image(seed: int = 0, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, size=(*size, 3), dtype=np.uint8))


def tone(rate: int, seconds: float = 1.5) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 300 * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


# ---- media -----------------------------------------------------------------------------------------------------------


def test_a_given_image_equals_its_file(tmp_path: Path) -> None:
    image().save(tmp_path / "a.png")
    expected = picture(tmp_path / "a.png", MediaLimits())
    content = (tmp_path / "a.png").read_bytes()
    loader = GivenMedia()
    given = [image(), str(tmp_path / "a.png"), f"file://{tmp_path / 'a.png'}", {"bytes": content, "path": "x.png"},
             {"bytes": content, "path": None}, {"path": str(tmp_path / "a.png")}]  # fmt: skip
    for value in given:
        found = loader.frames(Media("image", loader.add(value, "image"), "vision"), 4)
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected)
    loader.close()


@pytest.mark.parametrize("rate", [16000, 44100])
def test_given_sound_equals_its_file(tmp_path: Path, rate: int) -> None:
    import soundfile

    stereo = np.stack([tone(rate), 0.5 * tone(rate)])
    soundfile.write(tmp_path / "a.wav", stereo.T, rate, subtype="FLOAT")
    expected = MediaLoader(tmp_path).windows(Media("audio", "a.wav", "audio"), 4, 1.0, False)
    content = (tmp_path / "a.wav").read_bytes()
    decoder = SimpleNamespace(
        get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(stereo), sample_rate=float(rate))
    )
    loader = GivenMedia()
    given = [{"array": stereo, "sampling_rate": rate}, (stereo, rate), decoder, {"bytes": content, "path": "a.wav"}]
    for value in given:
        assert kind_of(value) == "audio"
        found = loader.windows(Media("audio", loader.add(value, "audio"), "audio"), 4, 1.0, False)
        torch.testing.assert_close(found.samples, expected.samples, atol=1e-6, rtol=0)
        assert torch.equal(found.lengths, expected.lengths)
    loader.close()


def test_integer_samples_are_scaled() -> None:
    loader = GivenMedia()
    name = loader.add({"array": np.array([0, 16384, -32768], dtype=np.int16), "sampling_rate": 16000}, "audio")
    found = loader.windows(Media("audio", name, "audio"), 1, 1.0, False)
    assert found.samples[0, :3].tolist() == [0.0, 0.5, -1.0]


def test_frames_are_those_in_the_middle_of_equal_parts() -> None:
    frames = np.zeros((10, 8, 8, 3), dtype=np.uint8) + np.arange(10, dtype=np.uint8)[:, None, None, None]
    pictures = [Image.fromarray(frame) for frame in frames]
    for value in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2), pictures):
        loader = GivenMedia()
        found = loader.frames(Media("video", loader.add(value, "video"), "vision"), 5)
        assert found.shape == (5, 3, 8, 8)
        assert found[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9]


def test_equal_content_has_one_fingerprint() -> None:
    loader = GivenMedia()
    one, same, other = (loader.add(value, "image") for value in (image(1), image(1), image(2)))
    prints = [loader.fingerprint(Media("image", name, "vision")) for name in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_limits_hold_for_what_is_given() -> None:
    loader = GivenMedia(MediaLimits(max_pixels=100, max_seconds=1.0, max_bytes=50))
    content = io.BytesIO()
    image().save(content, "PNG")
    with pytest.raises(MediaError, match="max_pixels"):
        loader.add(image(), "image")
    with pytest.raises(MediaError, match="max_seconds"):
        loader.add({"array": tone(16000), "sampling_rate": 16000}, "audio")
    with pytest.raises(MediaError, match="max_bytes"):
        loader.frames(Media("image", loader.add({"bytes": content.getvalue()}, "image"), "vision"), 1)
    loader.close()


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        ({"array": tone(16000)}, "audio", "sampling rate"),
        (tone(16000), "audio", "ndarray of shape"),
        ({"array": tone(16000) * np.nan, "sampling_rate": 16000}, "audio", "NaN"),
        ({"array": np.array(["a"]), "sampling_rate": 16000}, "audio", "its samples are"),
        (np.zeros((4, 8, 8, 3), dtype=np.float32), "video", "uint8"),
        ([], "video", "frames"),
        ({"url": "a.mp4", "video_start": 1.0}, "video", "cut the file"),
        ({"size": 3}, "image", "expected a path"),
        (None, "image", "NoneType"),
    ],
)
def test_what_cannot_be_used_is_told(value: Any, kind: Any, said: str) -> None:
    with pytest.raises(MediaError, match=said):
        GivenMedia().add(value, kind)


def test_urls_are_refused() -> None:
    loader = GivenMedia()
    with pytest.raises(MediaError, match="URL"):
        loader.frames(Media("image", loader.add("https://example.com/a.png", "image"), "vision"), 1)


def test_kinds_without_a_word() -> None:
    assert kind_of(image()) == kind_of("a/b.PNG") == "image"
    assert (
        kind_of("b.flac") == kind_of({"bytes": b"", "path": "b.wav"}) == kind_of({"array": [], "path": None}) == "audio"
    )
    assert kind_of("b.mp4") == kind_of([image()]) == kind_of({"type": "video", "url": "b"}) == "video"


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("ave", "events.txt"), ("music_avqa", "avqa.json")])
def test_a_sample_survives_both_spellings(world: Path, name: str, file: str) -> None:
    folder = world / "test"
    rows = BENCHMARKS[name].load(folder / file, options={"video_dir": "videos", "audio_dir": "audio"})
    assert rows
    for row in rows:
        assert row.sample is not None
        spelled = json.loads(json.dumps(messages_of(row.sample.prompt, folder)))
        back = sample_of(spelled, GivenMedia(), "speech", "x")
        assert [message.role for message in back.messages] == ["user"]
        for part, own in zip(back.messages[0].content, row.sample.prompt[0].content, strict=True):
            if isinstance(own, Text):
                assert part == own
            else:
                assert isinstance(part, Media)
                assert (part.kind, part.modality, part.path) == (own.kind, own.modality, str(folder / own.path))
                assert Path(part.path).is_file()


def test_conversations_with_history_and_without_media() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "audio", "url": "a.wav"}, {"type": "text", "text": "And now?"}]},
    ]
    sample = sample_of(turns, GivenMedia(), "speech", "x")
    assert [message.role for message in sample.prompt] == ["system", "user", "assistant", "user"]
    assert [media.modality for media in sample.media] == ["speech"]
    assert sample_of(user_turn(None, "Why?"), GivenMedia(), "audio", "x").prompt[0].text == "Why?"
    given = sample_of(
        user_turn([image(), {"array": tone(16000), "sampling_rate": 16000}], "?"), GivenMedia(), "audio", "x"
    )
    assert [(media.kind, media.modality) for media in given.media] == [("image", "vision"), ("audio", "audio")]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "no messages"),
        ([], "no messages"),
        ([{"role": "tool", "content": "x"}], "role is 'tool'"),
        (["text"], "role is None"),
        ([{"role": "user", "content": 3}], "content is int"),
        ([{"role": "user", "content": [{"type": "vidoe"}]}], "did you mean 'video'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "ends|last message"),
        ([{"role": "assistant", "content": [{"type": "image", "url": "a.png"}]}], "user's only"),
    ],
)
def test_messages_that_cannot_be_used(messages: Any, said: str) -> None:
    with pytest.raises(BadSample, match=said):
        sample_of(messages, GivenMedia(), "audio", "x")


# ---- generation settings ---------------------------------------------------------------------------------------------


def test_settings_that_are_honoured() -> None:
    assert Decoding.of({}) == Decoding.of({"until": [], "do_sample": False, "temperature": 0.7}) == Decoding()
    given = {
        "max_new_tokens": 16,
        "temperature": 0,
        "top_p": 1.0,
        "num_beams": 3,
        "do_sample": False,
        "until": ["\n\n", "Q:"],
    }
    assert Decoding.of(given) == Decoding(16, 3, ("\n\n", "Q:"))
    assert Decoding.of(given).cut("a cat Q: b\n\nc") == "a cat"
    assert Decoding.of({"until": "ASSISTANT:"}).cut("b ASSISTANT: c") == "b"
    assert Decoding.of({"image_aspect_ratio": "original", "top_k": 1, "until": None}).cut(" b\n\n") == "b"


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"do_sample": True}, "sampling"),
        ({"do_sample": True, "temperature": 0.7}, "do_sample=False"),
        ({"temperature": 0.2}, "sampling"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"num_beams": 1.5}, "whole number"),
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
    ],
)
def test_settings_that_are_refused(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Decoding.of(kwargs)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_tasks_name_benchmarks_and_classes_that_exist() -> None:
    yaml.SafeLoader.add_constructor("!function", lambda loader, node: node.value)
    for file in sorted((ROOT / "eval" / "lmms" / "tasks").glob("*.yaml")):
        task = yaml.safe_load(file.read_text())
        assert task["task"] == task["benchmark"] == file.stem
        assert task["benchmark"] in BENCHMARKS
        assert task["class"] == "eval.lmms.task.BenchmarkTask"
        assert "class BenchmarkTask(" in (ROOT / "eval" / "lmms" / "task.py").read_text()


def test_the_entry_point_and_the_overrides_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["mokamm"].split(":")
    assert f"def {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    overrides = (ROOT / "eval" / "lmms" / "overrides.txt").read_text().splitlines()
    wanted = [*project["dependencies"], *project["optional-dependencies"]["wandb"]]
    assert {line for line in overrides if not line.startswith("#")} <= set(wanted)
