"""Media references to tensors: where a file may lie, and how it is cut into the segments that encoders see.

    Media --resolve--> path in media_dir --decode--> frames uint8 (F,3,H,W) | windows float32 (F,S) + lengths (F,)

A video gives its pictures at the middle of F equal parts of its duration, an image one picture. Sound that fits into
the configured windows gives consecutive ones, the last zero padded; longer sound gives windows centred on the same
times as a video's frames (or, for speech, which loses its meaning in pieces, an error). Every failure is a MediaError
that names the file and what to do.

Cost: one decode a call; nothing is kept but content hashes. Axis letters: F segments, S audio samples of a window.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.headers import MediaLimits, check_file
from data.pictures import picture
from data.schema import Media, MediaError, MissingMedia, NoTrack, OverLimit, RefusedMedia, beside, local_path
from data.sound import CODEC_PADDING, SAMPLE_RATE, sound_track
from data.video import video_frames

__all__ = ["SAMPLE_RATE", "MediaLimits", "MediaLoader", "Windows", "cut_windows"]

_URL = re.compile(r"[a-z][a-z0-9+.\-]*://|(data|file|concat|pipe|crypto|subfile):", re.IGNORECASE)
_ALLOW = "or set data.allow_outside: true if you trust the rows"


@dataclass(slots=True)
class Windows:
    """samples (F,S) float32 mono at 16 kHz, zero padded; lengths (F,) int64 valid samples of each."""

    samples: Tensor
    lengths: Tensor


class MediaLoader:
    """Reads the media of samples. Paths are relative to `media_dir` and stay in it unless `allow_outside`; no URLs."""

    def __init__(
        self, media_dir: str | Path | None, limits: MediaLimits | None = None, allow_outside: bool = False
    ) -> None:
        self.media_dir = Path(media_dir).resolve() if media_dir is not None else None
        self.limits = limits or MediaLimits()
        self.allow_outside = allow_outside
        self._hashes: dict[tuple[str, int, int], str] = {}

    def resolve(self, media: Media) -> Path:
        """The file of a media reference.

        Raises RefusedMedia for one outside media_dir, a URL, or one that cannot be reached, and MissingMedia.
        """
        name = local_path(media.path)
        if _URL.match(name):
            raise RefusedMedia(
                f"{name!r} is a URL; media are read from local files only: download it into data.media_dir"
            )
        if not name or "\0" in name:
            raise RefusedMedia(
                f"the row's {media.kind} path {name!r} names no file; expected a path relative to data.media_dir"
            )
        if self.media_dir is None and not (self.allow_outside and Path(name).is_absolute()):
            raise RefusedMedia(f"{name!r}: the row names a {media.kind}, but data.media_dir is not set; set it")
        try:
            return self._located(name)
        except (OSError, RuntimeError, UnicodeError) as error:  # too long, no permission, a link to itself, half a pair
            reason = getattr(error, "strerror", None) or error
            raise RefusedMedia(
                f"{name[:200]!r}: cannot be resolved ({reason}); correct the row's path, or put the real file there and "
                "check the permissions of its folder"
            ) from None

    def frames(self, media: Media, segments: int) -> Tensor:
        """uint8 (F,3,H,W): F = `segments` pictures of a video, uniformly by timestamp; F = 1 for an image."""
        path = self.resolve(media)
        if media.kind == "image":
            return picture(path, self.limits)
        if media.kind == "video":
            return video_frames(path, segments, self.limits)
        raise NoTrack(
            f"{path}: the row uses it as sound, which has no pictures; give it the modality of an audio encoder"
        )

    def windows(self, media: Media, segments: int, seconds: float, whole: bool) -> Windows:
        """At most `segments` windows of `seconds` from a sound file or a video's own track; see `cut_windows`."""
        path = self.resolve(media)
        if media.kind == "image":
            raise NoTrack(
                f"{path}: the row uses it as an image, which has no sound; give it the modality of a vision encoder"
            )
        return cut_windows(sound_track(path, self.limits), segments, seconds, whole, path)

    def fingerprint(self, media: Media) -> str:
        """sha256 of the file's content; hashed once for each (path, size, modification time). Raises MediaError."""
        path = self.resolve(media)
        try:
            status = check_file(path, self.limits)
            key = (str(path), status.st_size, status.st_mtime_ns)
            if key not in self._hashes:
                with path.open("rb") as file:
                    self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise MediaError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
        return self._hashes[key]

    def _located(self, name: str) -> Path:
        path = ((self.media_dir or Path()) / name).resolve()
        if not self.allow_outside:
            self._check_inside(path, name)
        return self._existing(path, name)

    def _check_inside(self, path: Path, name: str) -> None:
        if Path(name).is_absolute():
            raise RefusedMedia(
                f"{name!r} is an absolute path; expected one relative to data.media_dir = {self.media_dir}; take its "
                f"front off by the source's options: {{strip_prefix: {Path(name).parent}}}, {_ALLOW}"
            )
        if ".." in Path(name).parts:
            raise RefusedMedia(
                f"{name!r} climbs with '..'; expected a path below data.media_dir = {self.media_dir}; {_ALLOW}"
            )
        if self.media_dir is None or not path.is_relative_to(self.media_dir):
            raise RefusedMedia(
                f"{name!r} is a link that leads out of data.media_dir = {self.media_dir} to {path}; copy the file "
                f"there, {_ALLOW}"
            )

    def _existing(self, path: Path, name: str) -> Path:
        if path.is_file():
            return path
        if path.is_dir():
            raise RefusedMedia(f"{path}: is a folder; the row must name a media file")
        if path.exists():
            raise RefusedMedia(f"{path}: is no regular file (a pipe or a device); the row must name a media file")
        if self.media_dir is not None and not self.media_dir.is_dir():
            raise MissingMedia(
                f"{name!r}: data.media_dir = {self.media_dir} does not exist; correct it or fetch the media"
            )
        if not path.parent.is_dir():
            raise MissingMedia(
                f"{path}: not found, nor is its folder; check data.media_dir and the row's path, or fetch the media"
            )
        close, others = beside(path)
        hint = f"did you mean '{close}'?" if close else f"the folder holds {others} other files."
        if "\\" in name:  # a path of Windows is one long name here
            hint = r"folders are told apart by '/', not by '\'."
        raise MissingMedia(f"{path}: not found; {hint} Check the row's path or fetch the file")


def cut_windows(samples_S: Tensor, segments: int, seconds: float, whole: bool, path: Path | str = "sound") -> Windows:
    """Cut 16 kHz mono sound into windows of `seconds`.

    Up to segments * seconds: ceil(duration / seconds) consecutive windows, the last zero padded. Longer: `segments`
    windows, each centred in one of as many equal parts of the sound; with `whole`, OverLimit, because speech must be
    heard to its end, but for what may be a codec's padding.
    """
    size = round(seconds * SAMPLE_RATE)
    if whole and len(samples_S) - segments * size < CODEC_PADDING * SAMPLE_RATE:
        samples_S = samples_S[: segments * size]
    total = len(samples_S)
    if total <= segments * size:
        count = -(-total // size)
        padded = torch.nn.functional.pad(samples_S, (0, count * size - total))
        lengths = (total - torch.arange(count) * size).clamp(max=size)
        return Windows(padded.view(count, size), lengths)
    if whole:
        raise OverLimit(
            f"{path}: lasts {total / SAMPLE_RATE:.2f} s, longer than the {segments} x {seconds:g} s that the config "
            "gives to speech; raise `segments` or `seconds` of that modality, or cut the recording"
        )
    starts = [(2 * k + 1) * total // (2 * segments) - size // 2 for k in range(segments)]
    starts = [min(max(start, 0), total - size) for start in starts]
    return Windows(
        torch.stack([samples_S[s : s + size] for s in starts]), torch.full((segments,), size, dtype=torch.int64)
    )
