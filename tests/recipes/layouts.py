"""The miniature world in the files and folders of the published data sets, where the recipes look for them.

    WORLD/{train,validation,test} (python -m data.miniworld) --lay_out_...--> FOLDER/datasets/...

Each function lays out what one scenario's recipes read, by the layouts that the publishers describe: names of files,
spellings, headers, containers (sound in the clips' own track, jpg, flac). What is asked and answered is the world's;
answers that a data set does not have (a colour among MUSIC-AVQA's 42 answers) are left out, and events get AVE's names.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.miniworld.tell import tell_picture, tell_sounds
from data.miniworld.write import Request, clip_scene, image_scene
from eval.benchmarks.music_avqa import ANSWERS

SPLITS = ("train", "validation", "test")
EVENTS = {
    "flute": "Flute", "drum": "Clock", "bell": "Church bell", "violin": "Violin, fiddle", "organ": "Accordion",
    "guitar": "Acoustic guitar", "horn": "Train horn",
}  # fmt: skip


def request_of(split: Path) -> Request:
    """What a split of the world was made from."""
    return Request(**json.loads((split / "DONE.json").read_text()))


def _jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, rows: list[Any], lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))


# ---- text alone ------------------------------------------------------------------------------------------------------


def text_rows(split: Path) -> Iterator[tuple[str, str]]:
    """Questions about scenes in words, and descriptions and sentences to repeat: what an LLM knows before it sees."""
    request = request_of(split)
    for row in _jsonl(split / "told.jsonl"):
        asked, answered = row["messages"]
        yield "".join(part["text"] for part in asked["content"]), answered["content"]
    for index in range(request.num):
        for text in (tell_picture(clip_scene(request, index)), tell_sounds(clip_scene(request, index))):
            yield f"Repeat: {text}", text
    for row in _jsonl(split / "transcription.jsonl"):
        text = row["messages"][1]["content"]
        yield f"Repeat: {text}", text


def lay_out_text(world: Path, folder: Path) -> None:
    """datasets/instruct, as configs/text/instruct.yaml reads it."""
    for split, name in (("train", "train"), ("validation", "validation")):
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
            for asked, answered in text_rows(world / split)
        ]
        _write(folder / f"datasets/instruct/{name}.jsonl", rows, lines=True)


# ---- audio-visual ----------------------------------------------------------------------------------------------------


def lay_out_av(world: Path, folder: Path) -> None:
    """Video-LLaVA's captions, AudioCaps, MUSIC-AVQA and AVE."""
    data = folder / "datasets"
    _video_llava(world / "train", data / "video_llava")
    for split, short in (("train", "train"), ("validation", "val")):
        _audiocaps(world / split, data / "audiocaps", short)
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        _music_avqa(world / split, data / "music_avqa", short)
        _ave(world / split, data / "ave", short)


def _video_llava(split: Path, out: Path) -> None:
    request, images, videos = request_of(split), [], []
    for path in sorted((split / "images").iterdir()):
        name = f"llava_image/{path.stem}.jpg"
        _as_jpeg(path, out / name)
        images.append(_caption("image", name, "<image>\nGive a brief description of the image.", _still(request, path)))
    for path in sorted((split / "videos").iterdir()):
        name = f"valley/{path.name}"
        _copy(path, out / name)
        told = tell_picture(clip_scene(request, int(path.stem)))
        videos.append(_caption("video", name, "Describe the following video concisely.\n<image>", told))
    _write(out / "llava_image_.json", images)
    _write(out / "valley_.json", videos)


def _caption(kind: str, path: str, prompt: str, caption: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": caption}]
    return {"id": Path(path).stem, kind: path, "conversations": turns}


def _still(request: Request, path: Path) -> str:
    return tell_picture(image_scene(request, int(path.stem)))


def _audiocaps(split: Path, out: Path, short: str) -> None:
    request = request_of(split)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{short}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["audiocap_id", "youtube_id", "start_time", "caption"])
        for index, path in enumerate(sorted((split / "audio").iterdir())):
            writer.writerow([index, path.stem, 30, tell_sounds(clip_scene(request, int(path.stem)))])
            _copy(path, out / short / path.name)


def _music_avqa(split: Path, out: Path, short: str) -> None:
    rows = [row for row in json.loads((split / "avqa.json").read_text()) if row["anser"] in ANSWERS]
    for row in rows:
        row["video_id"] = f"{short}{row['video_id']}"
    _write(out / f"avqa-{short}.json", rows)
    _clips(split, out / "videos", short)


def _ave(split: Path, out: Path, short: str) -> None:
    header, *lines = (split / "events.txt").read_text().splitlines()
    fields = [line.split("&") for line in lines]
    named = ["&".join([EVENTS[name], f"{short}{video}", *rest]) for name, video, *rest in fields]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{short}Set.txt").write_text("\n".join([header, *named]) + "\n")
    _clips(split, out / "AVE", short)


def _clips(split: Path, out: Path, short: str) -> None:
    """The clips with their sound in a track of their own, as videos come."""
    out.mkdir(parents=True, exist_ok=True)
    for video in sorted((split / "videos").iterdir()):
        join(video, split / "audio" / f"{video.stem}.wav", out / f"{short}{video.name}")


def join(video: Path, sound: Path, out: Path) -> None:
    """An mp4 of the video's own packets and the sound as AAC."""
    import av
    import soundfile

    wave, rate = soundfile.read(sound, dtype="float32")
    with av.open(str(video)) as pictures, av.open(str(out), "w") as container:
        source = pictures.streams.video[0]
        stream = container.add_stream_from_template(source)
        track = container.add_stream("aac", rate=rate, layout="mono")
        for packet in pictures.demux(source):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for packet in (*track.encode(frame), *track.encode(None)):
            container.mux(packet)


# ---- visual ----------------------------------------------------------------------------------------------------------


def lay_out_visual(world: Path, folder: Path) -> None:
    """LLaVA's captions and instructions (the questions of an image are the turns of a conversation), and POPE."""
    data, train = folder / "datasets", world / "train"
    captions, talks = [], []
    request, asked = request_of(train), _questions(train)
    for path in sorted((train / "images").iterdir()):
        name = f"{int(path.stem) // 1000:05d}/{path.stem}.jpg"
        _as_jpeg(path, data / "llava_pretrain" / name)
        prompt = "Render a clear and concise summary of the photo.\n<image>"
        captions.append(_caption("image", name, prompt, _still(request, path)))
        turns = []
        for k, (question, answer) in enumerate(asked[path.stem]):
            value = question if k else f"<image>\n{question}"
            turns += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        _as_jpeg(path, data / f"coco/train2017/{path.stem}.jpg")
        talks.append({"id": path.stem, "image": f"{path.stem}.jpg", "conversations": turns})
    _write(data / "llava_pretrain/blip_laion_cc_sbu_558k.json", captions)
    _write(data / "llava_instruct/llava_instruct_150k.json", talks)
    _pope(world / "test", data)


def _pope(split: Path, data: Path) -> None:
    rows = []
    for stem, pairs in _questions(split).items():
        name = f"COCO_val2014_{int(stem):012d}.jpg"
        _as_jpeg(split / f"images/{stem}.png", data / "coco/val2014" / name)
        rows += [{"image": name, "text": question, "label": answer} for question, answer in pairs]
    rows = [{"question_id": k + 1, **row} for k, row in enumerate(rows)]
    _write(data / "pope/coco_pope_random.json", rows, lines=True)


def _questions(split: Path) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers by image."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in _jsonl(split / "images.jsonl"):
        (image, question), answer = row["messages"][0]["content"], row["messages"][1]["content"]
        found.setdefault(Path(image["path"]).stem, []).append((question["text"], answer))
    return found


# ---- speech ----------------------------------------------------------------------------------------------------------


def lay_out_speech(world: Path, folder: Path) -> None:
    """LibriSpeech (the training sentences shared out over its three sets) and spoken instructions in messages' form."""
    data = folder / "datasets"
    libri = data / "LibriSpeech"
    said = _sentences(world / "train")
    sets = ("train-clean-100", "train-clean-360", "train-other-500")
    for k, name in enumerate(sets):
        _librispeech(said[k :: len(sets)], libri / name, speaker=100 + k)
    _librispeech(_sentences(world / "validation"), libri / "dev-clean", speaker=200)
    _librispeech(_sentences(world / "test"), libri / "test-clean", speaker=300)
    for split in ("train", "validation"):
        _instructions(world / split, libri, data / f"librispeech_instructions/{split}.jsonl")


def _sentences(split: Path) -> list[tuple[Path, str]]:
    rows = [row["messages"] for row in _jsonl(split / "transcription.jsonl")]
    return [(split / asked["content"][0]["path"], answered["content"]) for asked, answered in rows]


def _librispeech(said: list[tuple[Path, str]], out: Path, speaker: int, chapter: int = 7) -> None:
    place = out / f"{speaker}/{chapter}"
    place.mkdir(parents=True)
    lines = []
    for k, (path, text) in enumerate(said):
        name = f"{speaker}-{chapter}-{k:04d}"
        _as_flac(path, place / f"{name}.flac")
        lines.append(f"{name} {text.upper()}")
    (place / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")


def _instructions(split: Path, libri: Path, out: Path) -> None:
    """The world's spoken questions, and transcription in the words of the benchmark."""
    rows = _jsonl(split / "spoken.jsonl") + _jsonl(split / "transcription.jsonl")
    for row in rows:
        for part in row["messages"][0]["content"]:
            if part["type"] == "audio":
                path = Path(part["path"])
                part["path"] = f"instructions/{split.name}-{path.stem}.flac"
                _as_flac(split / path, libri / part["path"])
    _write(out, rows, lines=True)


# ---- files -----------------------------------------------------------------------------------------------------------


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _as_jpeg(source: Path, target: Path) -> None:
    from PIL import Image

    target.parent.mkdir(parents=True, exist_ok=True)
    Image.open(source).convert("RGB").save(target, quality=95)


def _as_flac(source: Path, target: Path) -> None:
    import soundfile

    target.parent.mkdir(parents=True, exist_ok=True)
    wave, rate = soundfile.read(source)
    soundfile.write(target, wave, rate)
