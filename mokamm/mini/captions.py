"""The data of stage 1: captions of what is seen and what is heard, alone and together, and transcripts. No questions.

Video and sound come together too, as stage 2 will have them, and speech after a scene told in words. Notes say what is
seen and heard over again, attributes in changing order, so that a media token must serve to be looked up by any of them.

Worlds of the base only (no diamond, horn, orange or cyan; six voices), from a seed of their own: no scene of the
miniature world's splits plays a part.

    FOLDER/videos/ID.mp4 audio/ID.wav images/ID.png speech/ID.wav   captions.jsonl (messages with typed content)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.miniworld.scene import BASE, Scene, sample_scene
from data.miniworld.speech import BASE_VOICES, Utterance, sample_utterance
from data.miniworld.tell import tell_picture, tell_scene, tell_sentence, tell_sounds
from data.miniworld.write import render_clip, render_image, render_speech, run_jobs
from mokamm.mini.text import DESCRIBE_PICTURE, DESCRIBE_SOUND, NOTE, TRANSCRIBE, note_lines

SEED = 90_210


def _scene(index: int) -> Scene:
    return sample_scene(np.random.default_rng([SEED, 0, index]), BASE)


def _still(index: int) -> Scene:
    return sample_scene(np.random.default_rng([SEED, 2, index]), BASE, still=True)


def _utterance(index: int) -> Utterance:
    rng = np.random.default_rng([SEED, 1, index])
    return sample_utterance(rng, tell_sentence(rng, BASE), BASE_VOICES)


def _row(media: list[dict[str, str]], prompt: str, answer: str) -> dict[str, Any]:
    content = [*media, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def _rows(clips: int, images: int, utterances: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng([SEED, 3])
    for index in range(clips):
        scene, name = _scene(index), f"{index:08d}"
        video = {"type": "video", "path": f"videos/{name}.mp4"}
        audio = {"type": "audio", "path": f"audio/{name}.wav"}
        yield _row([video], DESCRIBE_PICTURE, tell_picture(scene))
        yield _row([audio], DESCRIBE_SOUND, tell_sounds(scene))
        if index % 2:
            yield _row([video, audio], DESCRIBE_PICTURE, tell_picture(scene))
        else:
            yield _row([video, audio], DESCRIBE_SOUND, tell_sounds(scene))
        yield _row([video, audio], NOTE, "; ".join(note_lines(scene, rng)))
    for index in range(images):
        media = {"type": "image", "path": f"images/{index:08d}.png"}
        yield _row([media], DESCRIBE_PICTURE, tell_picture(_still(index)))
        yield _row([media], NOTE, "; ".join(note_lines(_still(index), rng, sounds=False)))
    for index in range(utterances):
        media = {"type": "audio", "as": "speech", "path": f"speech/{index:08d}.wav"}
        yield _row([media], TRANSCRIBE, _utterance(index).text)
        before = {"type": "text", "text": tell_scene(sample_scene(rng, BASE))}
        yield _row([before, media], TRANSCRIBE, _utterance(index).text)


def write_captions(folder: Path, clips: int, images: int, utterances: int) -> None:
    """Render `clips` videos with their sounds, `images` and `utterances`; does nothing where they are there."""
    done = folder / "captions.jsonl"
    if done.exists():
        return
    for name in ("videos", "audio", "images", "speech"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    jobs = [partial(render_clip, folder, index, partial(_scene, index)) for index in range(clips)]
    jobs += [partial(render_image, folder, index, partial(_still, index)) for index in range(images)]
    jobs += [partial(render_speech, folder, f"{index:08d}", _utterance(index)) for index in range(utterances)]
    run_jobs(jobs, os.cpu_count() or 1, "stage 1")
    done.write_text("".join(json.dumps(row) + "\n" for row in _rows(clips, images, utterances)))
