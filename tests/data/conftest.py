"""Small real media files, written by PyAV with known colours at known times and known samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

PALETTE = np.array(
    [
        [230, 20, 20],
        [20, 200, 20],
        [20, 20, 230],
        [230, 230, 20],
        [20, 220, 220],
        [220, 20, 220],
        [245, 245, 245],
        [10, 10, 10],
    ]
)


def _write_video(
    path: Path,
    colours: Sequence[int],
    starts_ms: Sequence[int] | None = None,
    *,
    options: dict[str, str] | None = None,
    codec: str = "libx264",
    size: tuple[int, int] = (64, 48),
    sound: np.ndarray | None = None,
    sound_delay_ms: int = 0,
    sound_codec: str = "aac",
) -> Path:
    """One frame for each entry of `colours` (indices into PALETTE), shown from starts_ms on (default: ten a second)."""
    starts_ms = [100 * k for k in range(len(colours))] if starts_ms is None else starts_ms
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream(sound_codec, rate=16_000, layout="mono") if sound is not None else None
        for colour, start in zip(colours, starts_ms, strict=True):
            rgb = np.broadcast_to(PALETTE[colour].astype(np.uint8), (size[1], size[0], 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame.pts, frame.time_base = start, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            pcm = (sound * 32767).round().astype(np.int16)[None]
            for first in range(0, pcm.shape[1], 1024):
                piece = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(pcm[:, first : first + 1024]), format="s16", layout="mono"
                )
                piece.sample_rate, piece.time_base = 16_000, Fraction(1, 16_000)
                piece.pts = first + 16 * sound_delay_ms
                container.mux(track.encode(piece))
            container.mux(track.encode())
    return path


@pytest.fixture
def write_video() -> Callable[..., Path]:
    return _write_video


@pytest.fixture
def colour_of() -> Callable[..., list[int]]:
    """The palette colours in the middle of frames (F,3,H,W)."""

    def nearest(frames) -> list[int]:
        middle = frames[:, :, frames.shape[2] // 2, frames.shape[3] // 2].numpy().astype(int)
        return [int(((PALETTE - rgb) ** 2).sum(1).argmin()) for rgb in middle]

    return nearest


@pytest.fixture
def noise() -> Callable[[float], np.ndarray]:
    """Reproducible noise of some seconds at 16 kHz, float64, within -0.5..0.5."""
    return lambda seconds, rate=16_000: np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * rate))
