"""From a video to pictures, by timestamp: file --> uint8 (F,3,H,W).

With [start, start + duration) the stream's extent, the k-th of F target times is start + (k + 1/2) / F * duration, and the
frame shown at time t is the one with pts <= t < next pts. Times are exact fractions, so variable frame rates need no
special care. The file is decoded once, in order, to its end, so that a file that was cut off is noticed instead of
yielding less. Where its last frame is shown only after that extent, it is decoded again over the true one: an MP4's header
adds the durations up in decoding order, which B-frames of uneven durations leave early (slides with -vsync vfr).

Cost: one sequential decode on one thread (data loader workers are the parallelism); memory: the F frames. F: frames.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from torch import Tensor

from data.headers import MediaLimits, check_complete, check_pixels, check_seconds, extent, frame_time, opened, stream_of
from data.schema import MediaError


def video_frames(path: Path, segments: int, limits: MediaLimits) -> Tensor:
    """`segments` pictures of a video, uniformly by timestamp: uint8 (F,3,H,W). Raises MediaError."""
    with opened(path, limits) as container:
        stream = stream_of(container, "video", path)
        check_pixels(path, stream.codec_context.width, stream.codec_context.height, limits)
        # for streams that contradict their header; twice, because coded sizes exceed shown ones a little
        stream.codec_context.options = {"max_pixels": str(2 * limits.max_pixels)}
        start, duration, exact = extent(container, stream, path)
        check_seconds(path, duration, limits)
        frames, last, end = _pick(container, stream, start, duration, segments, path, limits)
        if exact:
            tolerance = max(Fraction(1, 10), duration / 50, 2 * frame_time(stream))
            check_complete(path, end - start, duration, tolerance)
        if last >= start + duration:
            container.seek(stream.start_time or 0, stream=stream)
            shown = last - start + frame_time(stream)
            frames, _last, _end = _pick(container, stream, start, shown, segments, path, limits)
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def _pick(
    container: Any, stream: Any, start: Fraction, duration: Fraction, segments: int, path: Path, limits: MediaLimits
) -> tuple[list[np.ndarray], Fraction, Fraction]:
    """The frame shown at each target time, as RGB (H,W,3), and the times at which the last decoded one begins and ends."""
    targets = [start + duration * Fraction(2 * k + 1, 2 * segments) for k in range(segments)]
    picked: list[np.ndarray] = []
    held, held_rgb, last, end = None, None, start, start
    reformatter = VideoReformatter()  # one for the whole video: a frame's own would be set up anew for each

    def take() -> None:
        nonlocal held_rgb
        if held_rgb is None:
            held_rgb = _rgb(held, reformatter, picked[0].shape if picked else None, path, limits)
        picked.append(held_rgb)

    for index, frame in enumerate(container.decode(stream)):
        time = start + index * frame_time(stream) if frame.pts is None else frame.pts * frame.time_base
        check_seconds(path, time - start, limits)  # the header may have lied
        while held is not None and len(picked) < len(targets) and targets[len(picked)] < time:
            take()
        shown = frame.duration * frame.time_base if frame.duration else frame_time(stream)
        held, held_rgb, last, end = frame, None, time, max(end, time + shown)
    if held is None:
        raise MediaError(f"{path}: not one picture can be decoded; the file was cut off or is damaged: fetch it again")
    while len(picked) < len(targets):
        take()
    return picked, last, end


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
