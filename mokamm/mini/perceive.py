"""Trains the three miniature encoders on what the base may see: no diamond, horn, orange or cyan, six voices.

vision: contrastive, frames against captions, with near misses (one colour or place changed) in every batch; and the
patches of each thing against the words for it ("red circle"), because projectors read patches, not the whole.
audio: tagging, which instruments are heard in one second. speech: transcription by letters with CTC.
Each stops after its minutes; the learning rate falls to zero with the time used up.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.miniworld.draw import SIZE, centre, draw_frame
from data.miniworld.scene import BASE, PLAYS, SECONDS, Scene, Thing, sample_scene
from data.miniworld.sound import INSTRUMENTS, RATE
from data.miniworld.speech import BASE_VOICES, sample_utterance, speak
from data.miniworld.tell import in_reading_order, tell_sentence
from mokamm.mini.architecture import (
    CLIP_TEXT_LENGTH,
    PREPROCESS,
    SPEECH_SECONDS,
    VISION,
    native_bfloat16,
    new_audio,
    new_speech,
    new_vision,
    save_audio,
    save_speech,
    save_vision,
)

if TYPE_CHECKING:
    import open_clip

PHRASES = [f"{colour} {shape}" for colour in BASE.colours for shape in BASE.shapes]
PATCH = VISION["vision_cfg"]["patch_size"]
Region = tuple[int, int, np.ndarray]  # of a thing in a batch of frames: its frame, its phrase, its patches' shares
LETTERS = "_abcdefghijklmnopqrstuvwxyz "  # index 0 is CTC's blank


def fit(
    name: str, parameters: list[nn.Parameter], losses: Iterator[Tensor], rate: float, minutes: float
) -> dict[str, float]:
    """Take AdamW steps on the losses that come, until the minutes are used up."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02, foreach=True)
    began, seen = time.monotonic(), []
    for step, loss in enumerate(losses):
        used = (time.monotonic() - began) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.01, 1 - used)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
        if step % 25 == 24:
            row = {"part": name, "step": step + 1, "used": round(used, 3), "loss": round(float(np.mean(seen[-25:])), 4)}
            print(json.dumps(row), flush=True)
        if used >= 1:
            break
    return {"steps": len(seen), "loss": float(np.mean(seen[-25:]))}


def _precision() -> torch.autocast:
    """bfloat16 where the processor multiplies it natively."""
    return torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16())


def caption_moment(scene: Scene, second: float) -> str:
    """What a frame shows, in the order of reading."""
    seen = in_reading_order(t for t in scene.things if t.enter <= second < t.leave)
    return ", ".join(f"{t.colour} {t.shape} {t.row} {t.column}" for t in seen) or "none"


def _near_miss(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with one thing's colour or shape changed, or that thing gone."""
    things, i, draw = list(scene.things), int(rng.integers(len(scene.things))), rng.random()
    free = [shape for shape in BASE.shapes if scene.thing(shape) is None]
    if draw < 0.45:
        things[i] = dataclasses.replace(things[i], colour=BASE.colours[rng.integers(len(BASE.colours))])
    elif draw < 0.9 or len(things) == 1:
        things[i] = dataclasses.replace(things[i], shape=free[rng.integers(len(free))])
    else:
        del things[i]
    return dataclasses.replace(scene, things=tuple(things))


def _patches(thing: Thing, second: float) -> np.ndarray:
    """The patches whose middle lies within a thing, each with an equal share: (patches,), sum 1 (0 if it is off)."""
    x, y = centre(thing, second)
    middles = (np.arange(SIZE // PATCH) + 0.5) * PATCH
    within = np.hypot(middles[None, :] - x, middles[:, None] - y) < thing.size
    return (within / max(1, within.sum())).astype(np.float32).ravel()


def _pictures(rng: np.random.Generator, n: int) -> tuple[Tensor, list[str], list[Region]]:
    """n frames, normalised (n,3,H,W), the caption of each, and the things seen in them."""
    frames: list[np.ndarray] = []
    captions: list[str] = []
    regions: list[Region] = []
    while len(frames) < n:
        scene, second = sample_scene(rng, BASE, still=bool(rng.random() < 0.6)), float(rng.uniform(0, SECONDS))
        for variant in (scene, _near_miss(rng, scene)):
            for thing in variant.things:
                if thing.enter <= second < thing.leave:
                    words = PHRASES.index(f"{thing.colour} {thing.shape}")
                    regions.append((len(frames), words, _patches(thing, second)))
            frames.append(draw_frame(variant, second))
            captions.append(caption_moment(variant, second))
    mean, std = (torch.tensor(PREPROCESS[key]).view(3, 1, 1) for key in ("mean", "std"))  # type: ignore[arg-type]
    pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    return (pixels - mean) / std, captions, regions


def train_vision(folder: Path, tokenizer: Callable[..., dict], minutes: float) -> dict[str, float]:
    torch.manual_seed(1)
    model = new_vision()
    phrases = _clip_ids(tokenizer, PHRASES)

    def losses() -> Iterator[Tensor]:
        rng = np.random.default_rng(101)
        while True:
            pixels, captions, regions = _pictures(rng, 96)
            images, words, patches = zip(*regions, strict=True)
            with _precision():
                image, patches_NPC = _seen(model, pixels)
                text = model.encode_text(torch.cat([_clip_ids(tokenizer, captions), phrases]), normalize=True).float()
            text, names = text[: len(captions)], text[len(captions) :]
            scale = model.logit_scale.exp().clamp(max=100)
            same = torch.tensor([[a == b for a in captions] for b in captions])  # a near miss may be no miss
            target = same.float() / same.sum(1, keepdim=True)
            logits = scale * image @ text.T
            whole = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            things = torch.einsum("np,npc->nc", torch.from_numpy(np.stack(patches)), patches_NPC[list(images)])
            yield whole + F.cross_entropy(scale * F.normalize(things, dim=-1) @ names.T, torch.tensor(words))

    figures = fit("vision", list(model.parameters()), losses(), 1.5e-3, minutes)
    save_vision(model, folder / "vision")
    return figures


def _seen(model: open_clip.CLIP, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised embedding of each image (N,C), and its patches (N,P,C) in the layer that projectors read."""
    blocks = VISION["vision_cfg"]["layers"]
    seen = model.visual.forward_intermediates(
        pixels, indices=[blocks - 2], normalize_intermediates=True, output_fmt="NLC"
    )
    (patches_NPC,) = seen["image_intermediates"]
    return F.normalize(seen["image_features"].float(), dim=-1), (patches_NPC @ model.visual.proj).float()


def _clip_ids(tokenizer: Callable[..., dict], texts: list[str]) -> Tensor:
    ids = torch.zeros(len(texts), CLIP_TEXT_LENGTH, dtype=torch.long)
    for i, text in enumerate(texts):
        row = tokenizer(text)["input_ids"][: CLIP_TEXT_LENGTH - 1]
        ids[i, : len(row) + 1] = torch.tensor([*row, 2])
    return ids


def _window(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """One second of up to four instruments; some start or end within it."""
    heard = [
        list(BASE.shapes)[i] for i in rng.permutation(len(BASE.shapes))[: rng.choice(5, p=(0.1, 0.3, 0.3, 0.2, 0.1))]
    ]
    wave = 0.002 * rng.normal(size=RATE)
    for shape in heard:
        t = np.arange(RATE) / RATE + int(rng.integers(SECONDS))
        edge = np.minimum(1, np.minimum(t % 1, 1 - t % 1) / 0.02) if rng.random() < 0.5 else 1.0
        level = 0.2 * rng.uniform(0.6, 1.0)
        wave = wave + level * edge * INSTRUMENTS[PLAYS[shape]](t, float(rng.random()), rng)
    return np.clip(wave, -1, 1).astype(np.float32), [BASE.shapes.index(shape) for shape in heard]


def train_audio(folder: Path, minutes: float) -> dict[str, float]:
    torch.manual_seed(2)
    model = new_audio()
    head = nn.Linear(model.cfg.encoder_embed_dim, len(BASE.shapes))

    def losses() -> Iterator[Tensor]:
        rng = np.random.default_rng(102)
        while True:
            waves, heard = zip(*(_window(rng) for _ in range(48)), strict=True)
            target = torch.zeros(len(waves), len(BASE.shapes))
            for i, classes in enumerate(heard):
                target[i, classes] = 1
            with _precision():
                features, _ = model.features(torch.from_numpy(np.stack(waves)))
            yield F.binary_cross_entropy_with_logits(head(features.float()).mean(1), target)

    figures = fit("audio", [*model.parameters(), *head.parameters()], losses(), 1.5e-3, minutes)
    save_audio(model, folder / "audio.safetensors")
    return figures


def _utterances(n: int) -> tuple[Tensor, Tensor, list[str]]:
    """n utterances as log-mel frames (n, 80, mel frames) in half precision, their lengths in frames, their texts."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=SPEECH_SECONDS)
    rng, mels, lengths = np.random.default_rng(103), [], []
    said = [sample_utterance(rng, tell_sentence(rng, BASE), BASE_VOICES) for _ in range(n)]
    with multiprocessing.get_context("spawn").Pool() as pool:  # processes without torch speak several times faster
        for wave in pool.imap(speak, said, chunksize=20):
            cut = wave[: SPEECH_SECONDS * RATE]
            mels.append(extract(cut, sampling_rate=RATE, return_tensors="pt").input_features[0].half())
            lengths.append(len(cut) // 160)
    return torch.stack(mels), torch.tensor(lengths), [utterance.text for utterance in said]


def train_speech(folder: Path, minutes: float) -> dict[str, float]:
    torch.manual_seed(3)
    whisper = new_speech()
    head = nn.Linear(whisper.config.d_model, len(LETTERS))
    mels, lengths, texts = _utterances(5000)
    letters = [torch.tensor([LETTERS.index(letter) for letter in text]) for text in texts]

    def losses() -> Iterator[Tensor]:
        rng = np.random.default_rng(104)
        while True:
            rows = torch.from_numpy(rng.integers(len(texts), size=16))
            mel = mels[rows].float() + 0.05 * torch.randn(len(rows), 80, 1)
            band = int(rng.integers(70))
            mel[:, band : band + int(rng.integers(8))] = 0.0
            with _precision():
                hidden = whisper.encoder(mel).last_hidden_state
            scores = head(hidden.float()).log_softmax(-1).transpose(0, 1)
            targets = [letters[i] for i in rows.tolist()]
            sizes = torch.tensor([len(target) for target in targets])
            yield F.ctc_loss(scores, torch.cat(targets), lengths[rows] // 2, sizes, zero_infinity=True)

    figures = fit("speech", [*whisper.encoder.parameters(), *head.parameters()], losses(), 1.5e-3, minutes)
    save_speech(whisper, folder / "speech")
    return figures
