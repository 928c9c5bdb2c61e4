"""From a media file to arrays: video frames by timestamp, a mono 16 kHz sound track. Images: pictures.py.

    file --limits on bytes--> header --limits on pixels, seconds--> PyAV --> uint8 (F,3,H,W) | float32 (S,)

Frames: with [start, start + duration) the stream's extent, the k-th of F target times is start + (k + 1/2) / F *
duration, and the frame shown at time t is the one with pts <= t < next pts. Times are exact fractions, so variable
frame rates need no special care. The file is decoded once, in order, to its end, so that a file that was cut off is
noticed instead of yielding less.

Sound: channels are averaged, then resampled by `torchaudio.functional.resample`. It is chosen over FFmpeg's resampler
because it is a plain windowed-sinc convolution: linear, without state or latency, of exact length ceil(n * 16000 /
rate), the identity at 16 kHz; FFmpeg's mixes channels with other weights for integer than for float formats and buffers
its edges.

Cost: one sequential decode on one thread (data loader workers are the parallelism); memory: the F frames, or the mono
track.

Axis letters: F frames, S audio samples.
"""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch import Tensor

from data.schema import MediaError, NoTrack, OverLimit

SAMPLE_RATE = 16_000
_PHASES = (1000, 4000)  # filters of a resampler, at most; the second number where the first is off by _PITCH or more
_PITCH = 1e-5
_RATES = (1_000, 1_000_000)  # Hz; a header that claims another is damaged
# FFmpeg's containers that hold media and nothing else: playlists and scripts (hls, concat, ...) could open other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,wav,w64,flac,mp3,aac,aiff,au,caf,amr,gif,h264,"
    "hevc,m4v"
)
MAX_ASPECT = 100  # longer side to shorter; encoders scale the shorter side up, and a strip would become a huge picture
_GUESSED_DURATION = {"mp3", "aac", "amr", "mpegts", "mpeg"}  # FFmpeg estimates these from the bit rate
_SOUND_DELAY = Fraction(1, 20)  # s; a sound track that starts later than this after the picture is padded with silence
_CODEC_PADDING = Fraction(1, 10)  # s; up to so much more than the header says is a codec's last block, and cut away
_WAV_UNKNOWN = 0x7FFFF000  # programs that write to a pipe claim sizes from here on


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """A file whose header claims more is not decoded. Pixels are width * height of one picture."""

    max_pixels: int = 50_000_000
    max_seconds: float = 3600.0
    max_bytes: int = 2_000_000_000


def video_frames(path: Path, segments: int, limits: MediaLimits) -> Tensor:
    """`segments` pictures of a video, uniformly by timestamp: uint8 (F,3,H,W). Raises MediaError."""
    with _opened(path, limits) as container:
        stream = _stream(container, "video", path)
        check_pixels(path, stream.codec_context.width, stream.codec_context.height, limits)
        # for streams that contradict their header; twice, because coded sizes exceed shown ones a little
        stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels)}
        start, duration, exact = _extent(container, stream, path)
        _check_seconds(path, duration, limits)
        targets = [start + duration * Fraction(2 * k + 1, 2 * segments) for k in range(segments)]
        frames, end = _pick(container, stream, targets, start, path, limits)
        if exact:
            tolerance = max(Fraction(1, 10), duration / 50, 2 * _frame_time(stream))
            _check_complete(path, end - start, duration, tolerance)
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def sound_track(path: Path, limits: MediaLimits) -> Tensor:
    """The whole sound of an audio or video file as mono float32 (S,) at 16 kHz, from -1 to 1. Raises MediaError."""
    with _opened(path, limits) as container:
        stream = _stream(container, "audio", path)
        _start, duration, exact = _extent(container, stream, path)
        _check_seconds(path, duration, limits)
        if container.format.name == "wav":
            _check_wav(path)
        sound, rate, delay = _decoded_sound(container, stream, path, limits)
    if exact:
        _check_complete(path, Fraction(len(sound), rate), duration, max(Fraction(1, 10), duration / 50))
        if len(sound) - duration * rate < _CODEC_PADDING * rate:
            sound = sound[: round(duration * rate)]
    _check_seconds(path, delay + Fraction(len(sound), rate) - _CODEC_PADDING, limits)
    samples = torch.from_numpy(np.concatenate([np.zeros(round(delay * rate), dtype=np.float32), sound]))
    _check_finite(samples, path)
    return _resample(samples, rate)


def mono_sound(samples: np.ndarray, rate: int, name: Path | str, limits: MediaLimits) -> Tensor:
    """Decoded sound, (S,) or (channels, S) at `rate`, as `sound_track` gives it. Raises MediaError."""
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise MediaError(f"{name}: expected samples (S,) or (channels, S), found {samples.shape}")
    _check_rate(name, rate)
    _check_seconds(name, Fraction(samples.shape[-1], rate), limits)
    mono = samples if samples.ndim == 1 else samples.mean(axis=0, dtype=np.float64)
    track = torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))
    _check_finite(track, name)
    return _resample(track, rate)


# --- files and headers


def check_file(path: Path, limits: MediaLimits, expected: str = "a media file") -> os.stat_result:
    """The status of a file that may be read: regular, not empty, within max_bytes. Raises MediaError, OSError."""
    status = path.stat()
    if not path.is_file():
        raise MediaError(f"{path}: is not a regular file; expected {expected}")
    if status.st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); fetch or record it again")
    if status.st_size > limits.max_bytes:
        raise OverLimit(
            f"{path}: has {status.st_size} bytes, more than data.limits.max_bytes = {limits.max_bytes}; shorten it or "
            "raise the limit"
        )
    return status


@contextmanager
def reading(path: Path, limits: MediaLimits, expected: str) -> Iterator[None]:
    """Check what the file system says, then turn every decoding error into a MediaError."""
    try:
        check_file(path, limits, expected)
        yield
    except (av.FFmpegError, OSError, ValueError, EOFError, SyntaxError) as error:  # SyntaxError: Pillow, broken PNGs
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{path}: cannot be read as {expected} ({reason}): {_looks(path)}") from None


@contextmanager
def _opened(path: Path, limits: MediaLimits) -> Iterator[Any]:
    with (
        reading(path, limits, "a media file"),
        av.open(str(path), options={"format_whitelist": CONTAINERS}) as container,
    ):
        yield container


def _looks(path: Path) -> str:
    """What the file seems to be, for the message of one that cannot be decoded."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
        decoder = codecs.getincrementaldecoder("utf-8")()  # 512 bytes may end within a letter
        text = decoder.decode(head) if b"\0" not in head else ""
    except (OSError, UnicodeDecodeError):
        text = ""
    if text:
        return f"it holds text, beginning {text[:40]!r}; put the real media file in its place"
    return (
        "it is damaged, was cut off (a download that stopped?) or is of another kind; fetch it again or convert it "
        "with ffmpeg"
    )


def _stream(container: Any, kind: str, path: Path) -> Any:
    """The first stream of a kind; cover art in a sound file is no video."""
    streams = [s for s in getattr(container.streams, kind) if not s.disposition & Disposition.attached_pic]
    if not streams:
        has = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        if not container.streams.video and not container.streams.audio:
            raise MediaError(f"{path}: has neither pictures nor sound (it has: {has}): {_looks(path)}")
        name = {"video": "picture", "audio": "sound"}[kind]
        raise NoTrack(
            f"{path}: has no {name} track (it has: {has}); leave this {kind} out of the row or use another file"
        )
    if streams[0].codec_context is None:
        raise MediaError(f"{path}: its {kind} codec is unknown to FFmpeg; convert it with ffmpeg")
    streams[0].codec_context.thread_count = 1
    return streams[0]


def _extent(container: Any, stream: Any, path: Path) -> tuple[Fraction, Fraction, bool]:
    """(start, duration, exact) of a stream in seconds: its own header's, else the container's, else counted.

    `exact` says that the duration is this stream's own and that decoding must reach it.
    """
    start = (stream.start_time or 0) * stream.time_base
    certain = container.format.name not in _GUESSED_DURATION
    if stream.duration and stream.duration > 0:
        return start, stream.duration * stream.time_base, certain
    tagged = _clock(stream.metadata.get("DURATION", "")) - max(start, Fraction(0))  # Matroska: the track's last time
    if tagged > 0:
        return start, tagged, certain
    if container.duration and container.duration > 0:
        media = [s for s in container.streams if s.type in ("video", "audio")]
        return start, Fraction(container.duration, av.time_base), certain and len(media) == 1
    return start, _counted(path, stream.index, start), False


def _clock(text: str) -> Fraction:
    """'HH:MM:SS.fraction' in seconds; 0 when it is something else."""
    try:
        hours, minutes, seconds = text.strip("\0 ").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
    except ValueError:
        return Fraction(0)


def _counted(path: Path, index: int, start: Fraction) -> Fraction:
    """Duration of a stream that has none in a header, from its packets' times or number; nothing is decoded."""
    with av.open(str(path), options={"format_whitelist": CONTAINERS}) as container:
        stream: Any = container.streams[index]  # not to be touched once the container is closed: PyAV would crash
        unit, frame = stream.time_base, _frame_time(stream) if stream.type == "video" else Fraction(0)
        packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.size]
    times = [pts for pts, _ in packets if pts is not None]
    if not times:
        return len(packets) * frame
    return max(times) * unit - start + (max(duration for _, duration in packets) * unit or frame)


def _frame_time(stream: Any) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return 1 / Fraction(rate)


def check_pixels(path: Path | str, width: int, height: int, limits: MediaLimits) -> None:
    """Raises OverLimit where a header claims more pixels than data.limits.max_pixels, or a strip."""
    if width * height > limits.max_pixels:
        raise OverLimit(
            f"{path}: its header claims {width} x {height} = {width * height} pixels, more than data.limits.max_pixels "
            f"= {limits.max_pixels}; scale it down or raise the limit"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise OverLimit(
            f"{path}: its header claims {width} x {height} pixels, a strip more than {MAX_ASPECT} times as long as it "
            "is wide; cut it into pictures"
        )


def _check_seconds(path: Path | str, duration: Fraction, limits: MediaLimits) -> None:
    if duration > limits.max_seconds:
        raise OverLimit(
            f"{path}: lasts {float(duration):.1f} s, more than data.limits.max_seconds = {limits.max_seconds:g}; "
            "cut it or raise the limit"
        )


def _check_rate(path: Path | str, rate: int) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise MediaError(
            f"{path}: its header claims {rate} samples a second, which no recording has (1 kHz to 1 MHz are read); it is "
            "damaged: fetch it again"
        )


def _check_complete(path: Path, found: Fraction, declared: Fraction, tolerance: Fraction) -> None:
    if declared - found > tolerance:
        raise MediaError(
            f"{path}: its header claims {float(declared):.2f} s but only {float(found):.2f} s can be decoded: the file "
            "was cut off or is damaged; fetch it again"
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


# --- pictures and samples


def _pick(
    container: Any, stream: Any, targets: list[Fraction], start: Fraction, path: Path, limits: MediaLimits
) -> tuple[list[np.ndarray], Fraction]:
    """The frame shown at each target time, as RGB (H,W,3), and the time at which the last decoded frame ends."""
    picked: list[np.ndarray] = []
    held, held_rgb, end = None, None, start
    reformatter = VideoReformatter()  # one for the whole video: a frame's own would be set up anew for each

    def take() -> None:
        nonlocal held_rgb
        if held_rgb is None:
            held_rgb = _rgb(held, reformatter, picked[0].shape if picked else None, path, limits)
        picked.append(held_rgb)

    for index, frame in enumerate(container.decode(stream)):
        time = start + index * _frame_time(stream) if frame.pts is None else frame.pts * frame.time_base
        _check_seconds(path, time - start, limits)  # the header may have lied
        while held is not None and len(picked) < len(targets) and targets[len(picked)] < time:
            take()
        shown = frame.duration * frame.time_base if frame.duration else _frame_time(stream)
        held, held_rgb, end = frame, None, max(end, time + shown)
    if held is None:
        raise MediaError(f"{path}: not one picture can be decoded; the file was cut off or is damaged: fetch it again")
    while len(picked) < len(targets):
        take()
    return picked, end


def _rgb(
    frame: Any, reformatter: VideoReformatter, shape: tuple[int, ...] | None, path: Path, limits: MediaLimits
) -> np.ndarray:
    """One frame upright as uint8 (H,W,3), scaled to `shape` where the video changes its size on the way."""
    if frame.is_corrupt:
        raise MediaError(f"{path}: the picture at {frame.time} s is damaged; fetch the file again")
    check_pixels(path, frame.width, frame.height, limits)
    on_side, mirrored, upside_down = _shown_as(frame)
    height, width = frame.height, frame.width
    if shape is not None:
        height, width = (shape[1], shape[0]) if on_side else (shape[0], shape[1])
    # one thread: swscale's pool of them costs more than the conversion, and workers are the parallelism
    rgb = reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
    array = rgb.to_ndarray()
    array = array.transpose(1, 0, 2) if on_side else array
    return array[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _shown_as(frame: Any) -> tuple[bool, bool, bool]:
    """Whether a frame is shown with rows as columns, then mirrored, then upside down, by its display matrix.

    The matrix sends (x, y) to (a x + c y, b x + d y), y downwards (ISO/IEC 14496-12); only right angles are followed.
    """
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5]
    if a == d == 0:
        return True, bool(c < 0), bool(b < 0)
    return (False, bool(a < 0), bool(d < 0)) if b == c == 0 else (False, False, False)


def _decoded_sound(container: Any, stream: Any, path: Path, limits: MediaLimits) -> tuple[np.ndarray, int, Fraction]:
    """(mono samples (S,), their rate, the delay of the first in seconds)."""
    pieces: list[np.ndarray] = []
    count, rate, delay = 0, 0, Fraction(0)
    for frame in container.decode(stream):
        if not pieces:
            rate, delay = frame.sample_rate, _delay(container, frame)
            _check_rate(path, rate)
        if frame.sample_rate != rate:
            raise MediaError(f"{path}: its sampling rate changes in mid-file; convert it: ffmpeg -i IN -ar 16000 OUT")
        pieces.append(_mono(frame))
        count += frame.samples
        if count > limits.max_seconds * rate and count > _CODEC_PADDING * rate:
            _check_seconds(path, Fraction(count, rate) - _CODEC_PADDING, limits)
    if not count:
        raise MediaError(f"{path}: holds no sound samples (a recording of zero length?); record or export it again")
    return np.concatenate(pieces), rate, delay


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
    return delay if _SOUND_DELAY < delay < duration else Fraction(0)


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
