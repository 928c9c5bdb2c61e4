"""A media file before it is decoded: what the file system and the header say of it, and what is allowed.

    file --limits on bytes--> container --> stream --> extent (start, duration) --limits on pixels, seconds--> decoding

pictures.py, video.py and sound.py decode what passes. Times are exact fractions. Cost: reading the header; of a file whose
header gives no duration, its packets.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from data.schema import MediaError, NoTrack, OverLimit

# FFmpeg's containers that hold media and nothing else: playlists and scripts (hls, concat, ...) could open other files.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,wav,w64,flac,mp3,aac,aiff,au,caf,amr,nistsphere,"
    "gif,h264,hevc,m4v"
)
MAX_ASPECT = 100  # longer side to shorter; encoders scale the shorter side up, and a strip would become a huge picture
_GUESSED_DURATION = {"mp3", "aac", "amr", "mpegts", "mpeg"}  # FFmpeg estimates these from the bit rate


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """A file whose header claims more is not decoded. Pixels are width * height of one picture."""

    max_pixels: int = 50_000_000
    max_seconds: float = 3600.0
    max_bytes: int = 2_000_000_000


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
def opened(path: Path, limits: MediaLimits) -> Iterator[Any]:
    """The container of a file, of a kind that holds media alone; errors as in `reading`."""
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


def stream_of(container: Any, kind: str, path: Path) -> Any:
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


def extent(container: Any, stream: Any, path: Path) -> tuple[Fraction, Fraction, bool]:
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
        unit, frame = stream.time_base, frame_time(stream) if stream.type == "video" else Fraction(0)
        packets = [(p.pts, p.duration or 0) for p in container.demux(stream) if p.size]
    times = [pts for pts, _ in packets if pts is not None]
    if not times:
        return len(packets) * frame
    return max(times) * unit - start + (max(duration for _, duration in packets) * unit or frame)


def frame_time(stream: Any) -> Fraction:
    """Seconds from one frame to the next on average; a 25th where the header does not say."""
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


def check_seconds(path: Path | str, duration: Fraction, limits: MediaLimits) -> None:
    if duration > limits.max_seconds:
        raise OverLimit(
            f"{path}: lasts {float(duration):.1f} s, more than data.limits.max_seconds = {limits.max_seconds:g}; "
            "cut it or raise the limit"
        )


def check_complete(path: Path, found: Fraction, declared: Fraction, tolerance: Fraction) -> None:
    if declared - found > tolerance:
        raise MediaError(
            f"{path}: its header claims {float(declared):.2f} s but only {float(found):.2f} s can be decoded: the file "
            "was cut off or is damaged; fetch it again"
        )
