"""Media as lmms-eval's tasks hand them over: paths, or what a data set has decoded already.

    path, file:// URL                                    opened as ever, under the run's limits (data/media.py)
    PIL image; frames (F,H,W,3) uint8, a list of images  used as they are
    {"array", "sampling_rate"}, (array, rate), torchcodec's decoder (get_all_samples)    used as they are
    {"bytes", "path"}                                    written to a temporary file, then opened under the same limits

What is decoded gets a name, and the loader gives it out where a path would be opened: resampled and cut into the same
windows, of a video's frames those in the middle of as many equal parts. URLs are refused, and so are parts of a file
(video_start, video_end), which would have to be cut first.

Axis letters: F frames, S audio samples.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.media import MediaLimits, MediaLoader, Windows, cut_windows
from data.pictures import pixels
from data.schema import Kind, Media, MediaError
from data.sound import mono_sound

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")
SOUNDS = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus", ".aiff", ".au", ".caf", ".amr", ".wma")
PARTS = ("video_start", "video_end", "start_time", "end_time")


class GivenMedia(MediaLoader):
    """A loader for paths anywhere on the machine, and for media that were given decoded. Close it to forget them."""

    def __init__(self, limits: MediaLimits | None = None) -> None:
        super().__init__(None, limits, allow_outside=True)
        self._decoded: dict[str, Tensor] = {}  # frames uint8 (F,3,H,W) or sound float32 (S,) by name
        self._written: TemporaryDirectory[str] | None = None

    def add(self, value: Any, kind: Kind) -> str:
        """The path, or the name, under which a medium is to be had from this loader. Raises MediaError."""
        if isinstance(value, str | os.PathLike):
            path = str(value).removeprefix("file://")
            return path if "://" in path else str(Path(path).absolute())
        if isinstance(value, dict) and any(value.get(part) is not None for part in PARTS):
            raise MediaError(f"a part of a {kind} is asked for ({_describe(value)}); cut the file and name the piece")
        if isinstance(value, dict) and value.get("array") is None:
            return self._file(value, kind)
        name = f"given {kind} {len(self._decoded)}"
        if kind == "audio":
            self._decoded[name] = mono_sound(*_sound(value, name), name, self.limits)
        else:
            self._decoded[name] = torch.cat([pixels(image, name, self.limits) for image in _pictures(value, name)])
        return name

    def close(self) -> None:
        self._decoded.clear()
        if self._written is not None:
            self._written.cleanup()
            self._written = None

    def frames(self, media: Media, segments: int) -> Tensor:
        frames_F3HW = self._decoded.get(media.path)
        if frames_F3HW is None or media.kind == "audio":
            return super().frames(media, segments)
        if media.kind == "image":
            return frames_F3HW[:1]
        count = len(frames_F3HW)
        return frames_F3HW[[(2 * k + 1) * count // (2 * segments) for k in range(segments)]]

    def windows(self, media: Media, segments: int, seconds: float, whole: bool) -> Windows:
        samples_S = self._decoded.get(media.path)
        if samples_S is None or media.kind != "audio":
            return super().windows(media, segments, seconds, whole)
        return cut_windows(samples_S, segments, seconds, whole, media.path)

    def fingerprint(self, media: Media) -> str:
        decoded = self._decoded.get(media.path)
        if decoded is None:
            return super().fingerprint(media)
        content = hashlib.sha256(f"{decoded.dtype} {tuple(decoded.shape)} ".encode())
        content.update(decoded.contiguous().numpy().tobytes())
        return content.hexdigest()

    def _file(self, value: dict[str, Any], kind: Kind) -> str:
        """A data set's own form of a file that it has not decoded: its content, or its path."""
        content = value.get("bytes")
        path = next((value[key] for key in ("path", "url", kind) if isinstance(value.get(key), str)), None)
        if not isinstance(content, bytes):
            if path is None:
                raise MediaError(f"a {kind} is given as {_describe(value)}; expected a path, bytes or samples in it")
            return self.add(path, kind)
        self._written = self._written or TemporaryDirectory(prefix="mokamm-")
        file = Path(self._written.name) / f"{len(list(Path(self._written.name).iterdir()))}{Path(path or '').suffix}"
        file.write_bytes(content)
        return str(file)


def kind_of(value: Any) -> Kind:
    """What a medium is that comes without a word about it."""
    if isinstance(value, Image.Image):
        return "image"
    if isinstance(value, tuple) or hasattr(value, "get_all_samples"):
        return "audio"
    if isinstance(value, dict) and value.get("type") in ("image", "video", "audio"):
        return value["type"]
    if isinstance(value, dict) and ("array" in value or "sampling_rate" in value):
        return "audio"
    name = str(value.get("path") or value.get("url") or "") if isinstance(value, dict) else str(value)
    ending = Path(name).suffix.lower() if isinstance(value, dict | str | os.PathLike) else ""
    return "image" if ending in IMAGES else "audio" if ending in SOUNDS else "video"


def _sound(value: Any, name: str) -> tuple[np.ndarray, int]:
    """Samples (S,) or (channels, S), and their rate."""
    if hasattr(value, "get_all_samples"):
        heard = value.get_all_samples()
        samples, rate = heard.data, heard.sample_rate
    elif isinstance(value, dict):
        samples, rate = value["array"], value.get("sampling_rate")
    elif isinstance(value, tuple) and len(value) == 2:
        samples, rate = value
    else:
        raise MediaError(f"{name} is given as {_describe(value)}; expected a path, or samples with their sampling rate")
    if not isinstance(rate, int | float) or rate <= 0:
        raise MediaError(f"{name}: its sampling rate is {rate!r}; expected a number of Hz")
    array = np.asarray(samples)
    if array.dtype.kind == "i":
        array = array / -float(np.iinfo(array.dtype).min)
    if array.dtype.kind != "f":
        raise MediaError(f"{name}: its samples are {array.dtype}; expected floats from -1 to 1, or signed integers")
    return array, int(rate)


def _pictures(value: Any, name: str) -> list[Image.Image]:
    """One image, or the frames of a video."""
    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, list) and value and all(isinstance(frame, Image.Image) for frame in value):
        return value
    array = value.numpy() if isinstance(value, Tensor) else value
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 4 and len(array):
        if array.shape[-1] != 3 and array.shape[1] == 3:
            array = array.transpose(0, 2, 3, 1)
        if array.shape[-1] == 3:
            return [Image.fromarray(np.ascontiguousarray(frame)) for frame in array]
    raise MediaError(f"{name} is given as {_describe(value)}; expected a path, an image, or frames (F,H,W,3) uint8")


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {tuple(shape)}" if shape is not None else "")
