"""From a sound file, or a video's own track, to samples: file --> mono float32 (S,) at 16 kHz.

Channels are averaged, then resampled by `torchaudio.functional.resample`. It is chosen over FFmpeg's resampler because it
is a plain windowed-sinc convolution: linear, without state or latency, of exact length ceil(n * 16000 / rate), the
identity at 16 kHz; FFmpeg's mixes channels with other weights for integer than for float formats and buffers its edges.

Samples keep their time: where a frame's timestamp says that sound before it is lost (a recorder that dropped packets, a
packet that cannot be decoded), silence stands for it. Cost: one sequential decode on one thread; memory: the track.
S: samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from data.headers import MediaLimits, check_complete, check_seconds, extent, opened, stream_of
from data.schema import MediaError

SAMPLE_RATE = 16_000
CODEC_PADDING = Fraction(1, 10)  # s; up to so much more than there should be is a codec's last block, and cut away
_PHASES = (1000, 4000)  # filters of a resampler, at most; the second number where the first is off by _PITCH or more
_PITCH = 1e-5
_RATES = (1_000, 1_000_000)  # Hz; a header that claims another is damaged
_DELAY = Fraction(1, 20)  # s; sound that comes later than this after the picture, or the sound before, follows silence
_UNDECODABLE = Fraction(1, 50)  # share of packets; so many are skipped: stray bytes, tags behind the sound
_WAV_UNKNOWN = 0x7FFFF000  # programs that write to a pipe claim sizes from here on


def sound_track(path: Path, limits: MediaLimits) -> Tensor:
    """The whole sound of an audio or video file as mono float32 (S,) at 16 kHz, from -1 to 1. Raises MediaError."""
    with opened(path, limits) as container:
        stream = stream_of(container, "audio", path)
        _start, duration, exact = extent(container, stream, path)
        check_seconds(path, duration, limits)
        if container.format.name == "wav":
            _check_wav(path)
        sound, rate, delay = _decoded_sound(container, stream, path, duration, limits)
    if exact:
        check_complete(path, Fraction(len(sound), rate), duration, max(Fraction(1, 10), duration / 50))
        if len(sound) - duration * rate < CODEC_PADDING * rate:
            sound = sound[: round(duration * rate)]
    check_seconds(path, delay + Fraction(len(sound), rate) - CODEC_PADDING, limits)
    samples = torch.from_numpy(np.concatenate([np.zeros(round(delay * rate), dtype=np.float32), sound]))
    _check_finite(samples, path)
    return _resample(samples, rate)


def mono_sound(samples: np.ndarray, rate: int, name: Path | str, limits: MediaLimits) -> Tensor:
    """Decoded sound, (S,) or (channels, S) at `rate`, as `sound_track` gives it. Raises MediaError."""
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise MediaError(f"{name}: expected samples (S,) or (channels, S), found {samples.shape}")
    _check_rate(name, rate)
    check_seconds(name, Fraction(samples.shape[-1], rate), limits)
    mono = samples if samples.ndim == 1 else samples.mean(axis=0, dtype=np.float64)
    track = torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))
    _check_finite(track, name)
    return _resample(track, rate)


def _decoded_sound(
    container: Any, stream: Any, path: Path, duration: Fraction, limits: MediaLimits
) -> tuple[np.ndarray, int, Fraction]:
    """(mono samples (S,), their rate, the delay of the first in seconds)."""
    pieces: list[np.ndarray] = []
    count, rate, delay = 0, 0, Fraction(0)
    begin: Fraction | None = None  # the time of sample 0
    for frame in _frames(container, stream, path):
        if not pieces:
            rate, delay = frame.sample_rate, _delay(container, frame)
            _check_rate(path, rate)
        if frame.sample_rate != rate:
            raise MediaError(f"{path}: its sampling rate changes in mid-file; convert it: ffmpeg -i IN -ar 16000 OUT")
        if frame.pts is not None:
            time = frame.pts * frame.time_base
            begin = time - Fraction(count, rate) if begin is None else begin
            late = time - begin - Fraction(count, rate)
            if late > _DELAY and time - begin < duration:
                pieces.append(np.zeros(round(late * rate), dtype=np.float32))
                count += len(pieces[-1])
        pieces.append(_mono(frame))
        count += frame.samples
        if count > limits.max_seconds * rate and count > CODEC_PADDING * rate:
            check_seconds(path, Fraction(count, rate) - CODEC_PADDING, limits)
    if not count:
        raise MediaError(f"{path}: holds no sound samples (a recording of zero length?); record or export it again")
    return np.concatenate(pieces), rate, delay


def _frames(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """The decoded frames; packets that cannot be decoded are left out. MediaError where they are more than a few."""
    total, bad = 0, 0
    for packet in container.demux(stream):
        total += 1
        try:
            yield from packet.decode()
        except av.error.InvalidDataError as error:
            bad, reason = bad + 1, error.strerror
    if bad > _UNDECODABLE * total:
        raise MediaError(
            f"{path}: {bad} of its {total} packets of sound cannot be decoded ({reason}): the file was cut off or is "
            "damaged; fetch it again or convert it with ffmpeg"
        )


def _mono(frame: Any) -> np.ndarray:
    """Mean over the channels of one decoded frame, float32 (S,); integers are scaled by their type's full range."""
    array = frame.to_ndarray()
    channels = frame.layout.nb_channels
    array = array if frame.format.is_planar else array.reshape(-1, channels).T
    if array.dtype == np.uint8:
        array = (array.astype(np.float64) - 128) / 128
    elif array.dtype.kind == "i":
        array = array.astype(np.float64) / -float(np.iinfo(array.dtype).min)
    return array.mean(axis=0, dtype=np.float64).astype(np.float32)


def _delay(container: Any, frame: Any) -> Fraction:
    """How much later than the picture the sound begins; 0 for sound alone, and for the milliseconds codecs pad."""
    if frame.pts is None or container.start_time is None or not container.streams.video:
        return Fraction(0)
    delay = frame.pts * frame.time_base - Fraction(container.start_time, av.time_base)
    duration = Fraction(container.duration or 0, av.time_base)
    return delay if _DELAY < delay < duration else Fraction(0)


def _resample(samples: Tensor, rate: int) -> Tensor:
    """At 16 kHz: ceil(S * 16000 / rate) samples.

    torchaudio keeps a filter for each phase, of which odd rates have thousands (44101 Hz: 3 GB). So the ratio is the
    nearest one of few phases: exact for all usual rates, off by 1e-5 at most for nearly all, by 1.3e-4 for the worst
    (16002 Hz).
    """
    if rate == SAMPLE_RATE:
        return samples
    from torchaudio.functional import resample

    ratio = Fraction(SAMPLE_RATE, rate)
    few, more = (1 / (1 / ratio).limit_denominator(phases) for phases in _PHASES)
    near = few if abs(few / ratio - 1) < _PITCH else more
    found = resample(samples, near.denominator, near.numerator)
    length = math.ceil(len(samples) * ratio)
    return torch.nn.functional.pad(found[:length], (0, length - min(length, len(found))))


def _check_rate(path: Path | str, rate: int) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise MediaError(
            f"{path}: its header claims {rate} samples a second, which no recording has (1 kHz to 1 MHz are read); it is "
            "damaged: fetch it again"
        )


def _check_wav(path: Path) -> None:
    """FFmpeg takes a WAV's length from the file's size; this compares the size that its data chunk claims."""
    with path.open("rb") as file:
        size = path.stat().st_size
        file.seek(12)
        while len(head := file.read(8)) == 8:
            name, claimed = head[:4], int.from_bytes(head[4:], "little")
            left = size - file.tell()
            if name == b"data":
                if left < claimed < _WAV_UNKNOWN:
                    raise MediaError(
                        f"{path}: its header claims {claimed} bytes of sound but only {left} follow: the file was cut "
                        "off; fetch it again"
                    )
                return
            file.seek(claimed + claimed % 2, 1)


def _check_finite(samples: Tensor, name: Path | str) -> None:
    if not torch.isfinite(samples).all():
        raise MediaError(f"{name}: its samples hold NaN or infinity; export it again as 16 bit PCM")
