"""Pictures of media for a page: a few frames of a video, an image, the spectrogram and waveform of a sound; as JPEG bytes.

Media are read as the evaluation reads them (same loader, same limits). Cost: one decode a medium.

Axis letters: F frames, S audio samples.
"""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from data.media import MediaLoader
from data.schema import Media
from data.sound import SAMPLE_RATE

FRAMES = 4
HEIGHT = 96  # pixels of a frame, and of a sound's picture
SOUND_WIDTH = 384
LONGEST = 60.0  # seconds of a sound that are shown
WINDOW = 512  # samples of a spectrum
DYNAMICS = 70.0  # decibels between the darkest and the brightest


def thumbnail(media: Media, loader: MediaLoader) -> tuple[bytes, str]:
    """A JPEG of one medium, and what it shows. Raises MediaError as the loader does."""
    if media.kind == "audio":
        windows = loader.windows(media, 1, LONGEST, whole=False)
        samples_S = windows.samples[0, : int(windows.lengths[0])]
        return jpeg(sound_picture(samples_S.numpy())), f"{len(samples_S) / SAMPLE_RATE:.1f} s of sound"
    frames = loader.frames(media, FRAMES)
    strip = np.concatenate([_scaled(frame.permute(1, 2, 0).numpy()) for frame in frames], axis=1)
    return jpeg(strip), "picture" if media.kind == "image" else f"{len(frames)} frames of the video"


def sound_picture(samples_S: np.ndarray) -> np.ndarray:
    """uint8 (H,W,3): the spectrogram (0 to 8 kHz, low at the bottom) and below it the waveform."""
    below = HEIGHT // 3
    return np.concatenate([_spectrogram(samples_S, HEIGHT - below), _waveform(samples_S, below)])


def _spectrogram(samples_S: np.ndarray, height: int) -> np.ndarray:
    from matplotlib import colormaps

    padded = torch.from_numpy(np.pad(samples_S, (WINDOW, WINDOW)).astype(np.float32))
    spectrum = torch.stft(
        padded, WINDOW, hop_length=WINDOW // 4, window=torch.hann_window(WINDOW), center=False, return_complex=True
    ).abs()
    decibels = 20 * torch.log10(spectrum.clamp(min=1e-6))
    shares = ((decibels - decibels.max()) / DYNAMICS + 1).clamp(0, 1).flip(0)  # low notes at the bottom
    if float(spectrum.max()) < 1e-4:  # silence has no notes
        shares = torch.zeros_like(shares)
    resized = torch.nn.functional.adaptive_max_pool2d(shares[None], (height, SOUND_WIDTH))[0]
    return (colormaps["magma"](resized.numpy())[..., :3] * 255).astype(np.uint8)


def _waveform(samples_S: np.ndarray, height: int) -> np.ndarray:
    """Dark on white: from the lowest to the highest sample of each column, full scale from edge to edge."""
    picture = np.full((height, SOUND_WIDTH, 3), 255, dtype=np.uint8)
    ends = np.linspace(0, len(samples_S), SOUND_WIDTH + 1).astype(int)
    for column, (start, end) in enumerate(pairwise(ends)):
        part = samples_S[start : max(end, start + 1)].clip(-1, 1)
        low, high = (float(part.min()), float(part.max())) if len(part) else (0.0, 0.0)
        top, bottom = (round((1 - value) / 2 * (height - 1)) for value in (high, low))
        picture[top : bottom + 1, column] = (31, 111, 235)
    return picture


def _scaled(frame: np.ndarray) -> np.ndarray:
    """uint8 (H,W,3) at HEIGHT, with its proportions (at most 3 to 1, as of a panorama)."""
    from PIL import Image

    height, width = frame.shape[:2]
    wide = max(8, min(round(width * HEIGHT / height), 3 * HEIGHT))
    image = Image.fromarray(frame).resize((wide, HEIGHT), Image.Resampling.BILINEAR)
    return np.pad(np.asarray(image), ((0, 0), (0, 4), (0, 0)), constant_values=255)  # a gap between frames


def jpeg(picture: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=88)
    return file.getvalue()
