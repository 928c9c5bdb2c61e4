"""Frozen perception: one class per encoder behind the contract of `base.py`, and a disk cache of their features.

    encoder = build_encoder("clip", "openai/clip-vit-large-patch14", layer=-2)
    features, mask = encoder.encode(frames)              # (F,P,C), (F,P)

To add an encoder, write its class (see `Encoder`) and one line in `ENCODERS`. Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from encoders.errors import EncoderError, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from encoders.base import Encoder

__all__ = ["ENCODERS", "EncoderError", "build_encoder"]

# name in a config -> "module:class", imported when it is built
ENCODERS: dict[str, str] = {
    "open_clip": "encoders.vision:OpenClipEncoder",
    "clip": "encoders.vision:ClipEncoder",
    "siglip": "encoders.vision:SiglipEncoder",
    "beats": "encoders.audio:BeatsEncoder",
    "whisper": "encoders.speech:WhisperEncoder",
}


def build_encoder(name: str, path: str | Path, **options: Any) -> Encoder:
    """The frozen encoder `name` with the weights at `path` (a file, a folder, or a hub name), on the CPU.

    `options` are the keyword arguments of its class (all have `dtype` and `max_batch`). Raises EncoderError for an
    unknown name or option, for weights that are missing, broken or of another architecture, and for bad values.
    """
    import importlib
    import inspect

    if name not in ENCODERS:
        raise EncoderError(f"unknown encoder '{name}'{nearest(name, ENCODERS)}")
    module, attribute = ENCODERS[name].split(":")
    encoder_class = getattr(importlib.import_module(module), attribute)
    known = [key for key in inspect.signature(encoder_class).parameters if key != "path"]
    for option in options:
        if option not in known:
            raise EncoderError(f"encoder '{name}' has no option '{option}'{nearest(option, known)}")
    encoder: Encoder = encoder_class(path, **options)
    return encoder
