"""The sound of a scene: seven instruments of distinct timbre, mixed to 16 kHz mono, about 10 ms a clip.

Each instrument differs in register, spectrum and envelope; pitch and loudness vary within it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.miniworld.scene import SECONDS, Scene

RATE = 16_000
Wave = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def _harmonics(t: np.ndarray, f0: float, weights: dict[float, float], vibrato: float = 0.0) -> np.ndarray:
    phase = 2 * np.pi * f0 * t
    if vibrato:
        phase = phase + vibrato * np.sin(2 * np.pi * 5.5 * t)
    return sum((w * np.sin(k * phase) for k, w in weights.items()), np.zeros_like(t))


def _struck(t: np.ndarray, per_second: float, decay: float) -> np.ndarray:
    """The envelope of repeated strokes."""
    return np.exp(-np.mod(t, 1 / per_second) / decay)


def _flute(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return _harmonics(t, 650 + 250 * pitch, {1: 1.0, 2: 0.12}, vibrato=1.2) + 0.03 * rng.normal(size=t.size)


def _drum(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    body = np.sin(2 * np.pi * (75 + 30 * pitch) * t) + 0.5 * rng.normal(size=t.size)
    return 1.6 * body * _struck(t, 3.0, 0.06)


def _bell(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return _harmonics(t, 1000 + 300 * pitch, {1: 0.9, 2.76: 0.6, 5.4: 0.35}) * _struck(t, 2.0, 0.18)


def _violin(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return 0.7 * _harmonics(t, 300 + 120 * pitch, {k: 1 / k for k in range(1, 12)}, vibrato=0.35)


def _organ(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return 0.6 * _harmonics(t, 120 + 40 * pitch, {1: 1.0, 2: 0.8, 4: 0.6, 8: 0.5})


def _guitar(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    return 1.1 * _harmonics(t, 200 + 70 * pitch, {k: 1 / k for k in range(1, 7)}) * _struck(t, 4.5, 0.07)


def _horn(t: np.ndarray, pitch: float, rng: np.random.Generator) -> np.ndarray:
    swell = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * t)
    return 0.8 * _harmonics(t, 190 + 60 * pitch, {k: 1 / k for k in (1, 3, 5, 7, 9)}) * swell


INSTRUMENTS: dict[str, Wave] = {
    "flute": _flute, "drum": _drum, "bell": _bell, "violin": _violin, "organ": _organ, "guitar": _guitar, "horn": _horn,
}  # fmt: skip


def render_sound(scene: Scene) -> np.ndarray:
    """The clip's sound, float32 (160000,) in [-1, 1]."""
    rng = np.random.default_rng([scene.texture, 7])
    mix = 0.002 * rng.normal(size=SECONDS * RATE)
    for sound in scene.sounds:
        t = np.arange(sound.duration * RATE) / RATE
        edge = np.minimum(1, np.minimum(t, sound.duration - t) / 0.02)
        mix[sound.start * RATE : sound.end * RATE] += (
            0.2 * sound.level * edge * INSTRUMENTS[sound.instrument](t, sound.pitch, rng)
        )
    return np.clip(mix, -1, 1).astype(np.float32)
