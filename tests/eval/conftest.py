"""A tiny evaluated world: real media, and a run folder as training leaves it, with a random miniature model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

CLIPS = 4


def write_video(path: Path, seed: int) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng(seed).integers(0, 255, size=3, dtype=np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for k in range(8):
            picture = np.tile(colour, (64, 64, 1))
            picture[8 * k : 8 * k + 8] = 255 - picture[8 * k : 8 * k + 8]
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def write_sound(path: Path, pitch: float) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(2 * 16000) / 16000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * time).astype(np.float32), 16000)


def conversation(name: str, content: list[dict[str, Any]], answer: str) -> str:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": name, "messages": messages}) + "\n"


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test split of four clips, three recordings and two pictures; the last clip's video is cut off."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("small_world")
    questions = []
    for i in range(CLIPS):
        write_video(folder / f"videos/{i}.mp4", seed=i)
        write_sound(folder / f"audio/{i}.wav", 220.0 * (i + 1))
        for k, (kind, question, answer) in enumerate(
            [("Counting", "How many things sound?", "two"), ("Existential", "Is there a red ring that sounds?", "yes")]
        ):
            row = {"video_id": str(i), "question_id": k, "type": json.dumps(["Audio-Visual", kind])}
            questions.append(row | {"question_content": question, "templ_values": "[]", "anser": answer})
    last = folder / f"videos/{CLIPS - 1}.mp4"
    last.write_bytes(last.read_bytes()[:200])
    (folder / "avqa.json").write_text(json.dumps(questions))
    (folder / "events.txt").write_text("".join(f"bell&{i}&good&{i}&{i + 3}\n" for i in range(CLIPS - 1)))
    spoken, pictures = "", ""
    for i in range(3):
        write_sound(folder / f"speech/{i}.wav", 300.0 + 50 * i)
        spoken += conversation(f"s{i}", [{"type": "audio", "path": f"speech/{i}.wav", "as": "speech"}], "red")
    for i in range(2):
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 90 * i, dtype=np.uint8)).save(folder / f"images/{i}.png")
        content = [{"type": "image", "path": f"images/{i}.png"}, {"type": "text", "text": "A ring?"}]
        pictures += conversation(f"i{i}", content, "no")
    told = "".join(conversation(f"t{i}", [{"type": "text", "text": f"a red ring. {i}?"}], "red") for i in range(2))
    for name, text in (("spoken", spoken), ("transcription", spoken), ("images", pictures), ("told", told)):
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def configuration(base: Path, world: Path, stage_1: str | None, method: str) -> dict[str, Any]:
    def sense(name: str, path: str, segments: int, **options: Any) -> dict[str, Any]:
        encoder = {"name": name, "path": str(base / path)}
        return {"encoder": encoder, "projector": {"name": "mlp", "stride": 16}, "segments": segments, **options}

    files = {"avqa": "json", "events": "txt", "spoken": "jsonl", "transcription": "jsonl", "images": "jsonl"}
    files["told"] = "jsonl"
    return {
        "model": {
            "llm": {"path": str(base / "llm")},
            "modalities": {
                "vision": sense("open_clip", "vision", 2),
                "audio": sense("beats", "audio.safetensors", 2, seconds=1.0),
                "speech": sense("whisper", "speech", 1),
            },
        },
        "adapter": {"method": method, "r": 4},
        "data": {"media_dir": str(world), "train": [{"source": "music_avqa", "path": "avqa.json"}]},
        "training": {"output_dir": "unused", "init_from": stage_1},
        "evaluation": {
            "batch_size": 3,
            "max_new_tokens": 6,
            "benchmarks": [{"benchmark": f"miniworld_{n}", "path": f"{n}.{end}"} for n, end in files.items()],
        },
    }


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small_world: Path) -> Path:
    """The folder of a run as training leaves it: random base, random stage-1 projectors, MokA with a large random B."""
    from mokamm.build import build_model
    from mokamm.config import RunConfig
    from mokamm.mini.architecture import write_random
    from mokamm.weights import save_weights

    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    write_random(folder / "base")
    plain = RunConfig.model_validate(configuration(folder / "base", small_world, None, "none"))
    save_weights(build_model(plain, "cpu"), folder / "stage1")
    config = RunConfig.model_validate(configuration(folder / "base", small_world, str(folder / "stage1"), "moka"))
    model = build_model(config, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moka_B" in name:
                parameter.normal_(std=0.3)
    save_weights(model, folder / "run" / "final")
    config.dump(folder / "run" / "config.yaml")
    return folder / "run"
