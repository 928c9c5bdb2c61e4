"""Speech by eSpeak NG, called through ctypes: about 25 ms for 3 s of sound, 16 kHz mono, same words same samples.

The library carries state (wave phases, a random generator) from one utterance to the next, so each is spoken by a fork
of a process in which the library was initialised and never used. eSpeak NG is GPL: only this module loads it, and the
application runs `python -m data.miniworld` as a process of its own.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache

import numpy as np

RATE = 16_000
_RATE, _PITCH, _SYNCHRONOUS = 1, 3, 0x02  # espeak_RATE, espeak_PITCH, AUDIO_OUTPUT_SYNCHRONOUS
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

BASE_VOICES = ("en-us", "en-us+m3", "en-us+f2", "en", "en+m1", "en+f4")
NEW_VOICES = ("en-us+f3", "en-gb-x-rp+m7", "en-us+m5")  # in stage 2's training split, unknown to the base
TEST_VOICES = ("en-us+m1", "en+f2", "en+f5")  # in the test split only


@dataclass(frozen=True, slots=True)
class Utterance:
    """What is said and how. speed: words a minute; pitch: 0..99; noise: standard deviation relative to the speech."""

    text: str
    voice: str
    speed: int
    pitch: int
    noise: float
    seed: int


class _Engine:
    def __init__(self) -> None:
        import espeakng_loader

        self.library = ctypes.cdll.LoadLibrary(espeakng_loader.get_library_path())
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 500, espeakng_loader.get_data_path().encode(), 0)
        self.chunks: list[np.ndarray] = []
        self.callback = _CALLBACK(self._collect)  # kept, or ctypes would free it
        self.library.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples: ctypes._Pointer, count: int, events: int) -> int:
        if count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, utterance: Utterance) -> np.ndarray:
        """Samples at the library's own rate, spoken in a child process."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with os.fdopen(writing, "wb") as pipe:
                    pipe.write(self._speak(utterance).tobytes())
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            samples = np.frombuffer(pipe.read(), np.float32)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            raise ValueError(f"eSpeak NG could not speak {utterance}: is there such a voice?")
        return samples

    def _speak(self, utterance: Utterance) -> np.ndarray:
        self.library.espeak_ng_SetRandSeed(1)
        if self.library.espeak_SetVoiceByName(utterance.voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice '{utterance.voice}'")
        self.library.espeak_SetParameter(_RATE, utterance.speed, 0)
        self.library.espeak_SetParameter(_PITCH, utterance.pitch, 0)
        self.chunks.clear()
        text = utterance.text.encode()
        self.library.espeak_Synth(text, len(text) + 1, 0, 1, 0, 1, None, None)
        return np.concatenate(self.chunks).astype(np.float32) / 32768


@cache
def _engine() -> _Engine:
    return _Engine()


def speak(utterance: Utterance) -> np.ndarray:
    """The utterance as float32 (S,) at 16 kHz, silence at both ends trimmed, peak 0.6, noise added."""
    engine = _engine()
    wave = _resample(engine.speak(utterance), engine.rate)
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    wave = wave[max(0, loud[0] - 400) : loud[-1] + 800]
    wave = 0.6 * wave / np.abs(wave).max()
    noise = np.random.default_rng(utterance.seed).normal(size=wave.size) * utterance.noise * wave.std()
    return np.clip(wave + noise, -1, 1).astype(np.float32)


def _resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """To 16 kHz by FFmpeg: a process that has not loaded torch forks ten times faster."""
    import av

    frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def sample_utterance(rng: np.random.Generator, text: str, voices: tuple[str, ...]) -> Utterance:
    voice = voices[rng.integers(len(voices))]
    speed, pitch = int(rng.integers(165, 215)), int(rng.integers(30, 70))
    return Utterance(text, voice, speed, pitch, float(rng.uniform(0.01, 0.08)), int(rng.integers(2**31)))
