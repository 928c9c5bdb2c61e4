"""Renders one split of the miniature world: media files and annotations in published formats.

    OUT/SPLIT/videos/ID.mp4  audio/ID.wav        ten-second clips; the video is silent, its sound lies beside it
              speech/ID.wav  images/ID.png
              avqa.json                          MUSIC-AVQA rows
              avqa_german.json                   the same questions and answers in German
              events.txt                         AVE annotation rows
              spoken.jsonl transcription.jsonl images.jsonl   messages with typed content
              told.jsonl                         messages of text alone: a scene in words and a question about it
              DONE.json                          what was asked for; written last

N clips come with about 5 N audio-visual questions, N/2 events, N spoken questions, N/2 sentences, N/2 images of two
questions, and 2 N questions about scenes told in words (a split made before these or the German ones existed gets them
added). Every scene is drawn from (seed, split, index) alone, so the number of processes changes nothing. The folder is
rendered beside its place and renamed into it. Cost: about 0.1 s a clip on one core.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import connection, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from data.miniworld.ask import AVQA, IMAGES, SPOKEN, Balance, Question
from data.miniworld.draw import draw_frame, png_bytes, write_video
from data.miniworld.german import in_german
from data.miniworld.scene import Scene, sample_scene
from data.miniworld.sound import RATE, render_sound
from data.miniworld.speech import BASE_VOICES, NEW_VOICES, TEST_VOICES, Utterance, sample_utterance, speak
from data.miniworld.tell import split_of, tell_scene, tell_sentence
from data.schema import UserError

SPLITS = {"train": 0, "validation": 1, "test": 2}
VOICES = {"train": BASE_VOICES + NEW_VOICES, "validation": BASE_VOICES + NEW_VOICES, "test": TEST_VOICES}
VERSION = 1  # of the world: a change of what is drawn or asked raises it
QUESTIONS_PER_CLIP = 6
LEAD_INS = ("", "please say ", "now ", "listen ", "tell us ", "can you say ", "quickly ", "i ask you ")
_CLIPS, _SPOKEN, _SENTENCES, _IMAGES, _TOLD = range(5)


@dataclass(frozen=True, slots=True)
class Request:
    """What a split is made from; recorded in DONE.json."""

    split: str
    num: int
    seed: int
    version: int = VERSION

    def rng(self, kind: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS[self.split], kind, index])

    def choices(self, kind: int) -> np.random.Generator:
        """The generator of what is asked, apart from those of the scenes."""
        return np.random.default_rng([self.seed, SPLITS[self.split], kind, 2**31])


def _identity(index: int) -> str:
    return f"{index:08d}"


def clip_scene(request: Request, index: int) -> Scene:
    return sample_scene(request.rng(_CLIPS, index))


def image_scene(request: Request, index: int) -> Scene:
    return sample_scene(request.rng(_IMAGES, index), still=True)


def write_wave(path: Path, wave: np.ndarray) -> None:
    import soundfile

    soundfile.write(path, wave, RATE, subtype="PCM_16")


def render_clip(folder: Path, index: int, make: Callable[[], Scene]) -> None:
    """make: draws the scene, in the process that renders it."""
    scene = make()
    write_video(scene, folder / "videos" / f"{_identity(index)}.mp4")
    write_wave(folder / "audio" / f"{_identity(index)}.wav", render_sound(scene))


def render_image(folder: Path, index: int, make: Callable[[], Scene]) -> None:
    (folder / "images" / f"{_identity(index)}.png").write_bytes(png_bytes(draw_frame(make(), 5.0)))


def render_speech(folder: Path, name: str, utterance: Utterance) -> None:
    write_wave(folder / "speech" / f"{name}.wav", speak(utterance))


def avqa_rows(
    request: Request, say: Callable[[Question], Question] = lambda question: question
) -> list[dict[str, Any]]:
    """MUSIC-AVQA's rows, its spelling of `anser` included; `say` puts each question in other words."""
    balance, rng = Balance(AVQA), request.choices(_CLIPS)
    rows: list[dict[str, Any]] = []
    for index in range(request.num):
        for question in map(say, balance.pick(clip_scene(request, index), rng, QUESTIONS_PER_CLIP)):
            rows.append(
                {
                    "video_id": _identity(index),
                    "question_id": len(rows),
                    "type": json.dumps(list(AVQA[question.kind].type)),
                    "question_content": question.text,
                    "templ_values": "[]",
                    "question_deleted": 0,
                    "anser": question.answer,
                }
            )
    return rows


def event_lines(request: Request) -> list[str]:
    """AVE's annotation lines, for the clips with exactly one thing seen and heard together."""
    lines = ["Category&VideoID&Quality&StartTime&EndTime"]
    for index in range(request.num):
        if event := clip_scene(request, index).event():
            name, start, end = event
            lines.append(f"{name}&{_identity(index)}&good&{start}&{end}")
    return lines


def _row(name: str, content: list[dict[str, Any]], answer: str, question_type: tuple[str, str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "meta": {"question_type": list(question_type)}}


def _speech_entry(name: str) -> dict[str, str]:
    return {"type": "audio", "as": "speech", "path": f"speech/{name}.wav"}


def spoken(request: Request) -> Iterator[tuple[dict[str, Any], tuple[str, Utterance]]]:
    """Questions that exist in the sound only, about a scene told in words; each split has sentences of its own."""
    balance, choices = Balance(SPOKEN), request.choices(_SPOKEN)
    index = found = 0
    while found < request.num:
        rng = request.rng(_SPOKEN, index)
        scene, index = sample_scene(rng), index + 1
        for question in balance.pick(scene, choices, 1):
            own = [said for lead in LEAD_INS if split_of(said := lead + question.text) == request.split]
            if not own:
                continue
            name = f"question-{_identity(found)}"
            utterance = sample_utterance(rng, own[rng.integers(len(own))], VOICES[request.split])
            content = [
                {"type": "text", "text": tell_scene(scene)},
                _speech_entry(name),
                {"type": "text", "text": "Answer the spoken question."},
            ]
            yield _row(name, content, question.answer, SPOKEN[question.kind].type), (name, utterance)
            found += 1


def sentences(request: Request, n: int) -> Iterator[tuple[dict[str, Any], tuple[str, Utterance]]]:
    """n sentences to transcribe; each split has sentences of its own."""
    for index in range(n):
        rng = request.rng(_SENTENCES, index)
        while split_of(text := tell_sentence(rng)) != request.split:
            pass
        name = f"sentence-{_identity(index)}"
        content = [_speech_entry(name), {"type": "text", "text": "Write down what is said."}]
        yield (
            _row(name, content, text, ("Speech", "Transcription")),
            (name, sample_utterance(rng, text, VOICES[request.split])),
        )


def image_rows(request: Request, n: int) -> list[dict[str, Any]]:
    """Yes/no object questions as in POPE, two an image, as many yes as no."""
    balance, choices = Balance(IMAGES), request.choices(_IMAGES)
    rows: list[dict[str, Any]] = []
    for index in range(n):
        scene = image_scene(request, index)
        for question in balance.pick(scene, choices, 1) + balance.pick(scene, choices, 1):
            content = [
                {"type": "image", "path": f"images/{_identity(index)}.png"},
                {"type": "text", "text": question.text},
            ]
            rows.append(_row(f"image-{len(rows):08d}", content, question.answer, ("Image", "Object")))
    return rows


def told_rows(request: Request, n: int) -> list[dict[str, Any]]:
    """Text alone: a scene in words, each another one, and one of the audio-visual questions about it."""
    balance, choices = Balance(AVQA), request.choices(_TOLD)
    rows: list[dict[str, Any]] = []
    index = 0
    while len(rows) < n:
        scene, index = sample_scene(request.rng(_TOLD, index)), index + 1
        for question in balance.pick(scene, choices, 1):
            content: list[dict[str, Any]] = [
                {"type": "text", "text": tell_scene(scene) + " "},
                {"type": "text", "text": question.text, "question": True},
            ]
            rows.append(_row(f"told-{len(rows):08d}", content, question.answer, AVQA[question.kind].type))
    return rows


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_avqa(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=0))


# Annotations that came after the first worlds were made, and what writes them.
_LATER: dict[str, Callable[[Path, Request], None]] = {
    "told.jsonl": lambda path, request: _jsonl(path, told_rows(request, 2 * request.num)),
    "avqa_german.json": lambda path, request: _write_avqa(path, avqa_rows(request, in_german)),
}


def lacking(folder: Path) -> list[str]:
    """The annotation files that a split of before they existed lacks."""
    return [name for name in _LATER if not (folder / name).exists()]


def _add_lacking(folder: Path, request: Request) -> None:
    for name in lacking(folder):
        beside = folder / f".{name}.{os.getpid()}"
        _LATER[name](beside, request)
        beside.rename(folder / name)


def run_jobs(jobs: Sequence[Callable[[], object]], workers: int, label: str) -> None:
    """Run the jobs in processes of their own, under a progress bar. UserError where one of these was killed."""
    from tqdm import tqdm

    with ProcessPoolExecutor(workers, initializer=_begin) as pool:
        try:
            done = pool.map(_call, jobs, chunksize=8)
            for _ in tqdm(done, total=len(jobs), desc=label, unit="file", mininterval=1.0):
                pass
        except BrokenProcessPool:
            raise UserError(
                f"{label}: a process that renders was killed, perhaps for want of memory; "
                f"`mokamm data make` takes --workers (here {workers})"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin() -> None:
    """In each process: a single thread computes, the main process alone heeds a Ctrl-C, and its end is the end."""
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _call(job: Callable[[], object]) -> None:
    job()


def _fill(folder: Path, request: Request, workers: int) -> None:
    half = max(1, request.num // 2)
    _write_avqa(folder / "avqa.json", avqa_rows(request))
    (folder / "events.txt").write_text("\n".join(event_lines(request)) + "\n")
    asked, said = list(spoken(request)), list(sentences(request, half))
    _jsonl(folder / "spoken.jsonl", (row for row, _ in asked))
    _jsonl(folder / "transcription.jsonl", (row for row, _ in said))
    _jsonl(folder / "images.jsonl", image_rows(request, half))
    _add_lacking(folder, request)
    jobs: list[Callable[[], None]] = [
        partial(render_clip, folder, index, partial(clip_scene, request, index)) for index in range(request.num)
    ]
    jobs += [partial(render_image, folder, index, partial(image_scene, request, index)) for index in range(half)]
    jobs += [partial(render_speech, folder, *speech) for _, speech in asked + said]
    run_jobs(jobs, workers, f"miniature world, {request.split}")
    (folder / "DONE.json").write_text(json.dumps(asdict(request)) + "\n")


def write_split(out: str | Path, split: str, num: int, seed: int = 0, workers: int | None = None) -> Path:
    """Render a split into OUT/SPLIT and return that folder; of one that is there already, only what text it lacks.

    Raises UserError for an unknown split, a number below one, or a folder that holds another request's split.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split}: expected one of {', '.join(SPLITS)}")
    if num < 1:
        raise UserError(f"--num {num}: expected at least 1 clip")
    request, folder = Request(split, num, seed), Path(out) / split
    if folder.exists():
        done = folder / "DONE.json"
        if done.exists() and json.loads(done.read_text()) == asdict(request):
            _add_lacking(folder, request)
            return folder
        raise UserError(
            f"{folder} exists and holds something else than {asdict(request)}: remove it or choose another --out"
        )
    unfinished = folder.with_name(f".{split}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in ("videos", "audio", "speech", "images"):
        (unfinished / name).mkdir(parents=True)
    try:
        _fill(unfinished, request, workers or os.cpu_count() or 1)
        if folder.exists():  # by another process, meanwhile
            return write_split(out, split, num, seed)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder
