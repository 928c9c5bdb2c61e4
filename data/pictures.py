"""From an image file to an array: upright, eight bits a channel, RGB.

Orientation is read from the EXIF here and not by ImageOps.exif_transpose, which writes the EXIF anew and fails where any
entry of it is damaged, as is common in images from the web.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from data.headers import MediaLimits, check_pixels, reading
from data.schema import MediaError, OverLimit

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # not EPS: Pillow would run Ghostscript
_SIXTEEN_BITS = {("I", "PNG"), ("I", "PPM")}  # what Pillow opens as 32 bits though the format has 16 at most
# by EXIF's orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def picture(path: Path, limits: MediaLimits) -> Tensor:
    """An image as uint8 (1,3,H,W), turned upright by its EXIF orientation; alpha is dropped. Raises MediaError."""
    with reading(path, limits, "an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
        try:
            with _decoding():
                image = Image.open(path, formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            raise OverLimit(f"{path}: the header claims too large an image ({error}); scale it down") from None
        with image:
            return pixels(image, path, limits)


def pixels(image: Image.Image, name: Path | str, limits: MediaLimits) -> Tensor:
    """An opened image as `picture` gives it. Raises MediaError, which calls it by `name`, for one over the limits."""
    check_pixels(name, image.width, image.height, limits)
    with _decoding():
        image.load()  # which turns a TIFF, and takes its orientation away
    upright = _eight_bits(image, name)
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in _TURNS:
        upright = upright.transpose(_TURNS[orientation])
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)[None].contiguous()


@contextmanager
def _decoding() -> Iterator[None]:
    """Pillow's bare RuntimeErrors, of damaged AVIFs, as the ValueErrors that it has for others."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _eight_bits(image: Image.Image, name: Path | str) -> Image.Image:
    """Pictures of 16 bits scaled to 8; Pillow's own conversion would clip them. Raises MediaError for wider ones."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    if not image.mode.startswith("I;16") and (image.mode, image.format) not in _SIXTEEN_BITS:
        raise MediaError(
            f"{name}: its values ({values.dtype}, {values.min()} to {values.max()}) have no white that is known; save it "
            "with 8 or 16 bits a channel"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))
