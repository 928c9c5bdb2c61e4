"""Frozen perception: one class per encoder behind the contract of `base.py`, and a disk cache of their features.

    encoder = build_encoder("clip", "openai/clip-vit-large-patch14", layer=-2)
    features, mask = encoder.encode(frames)              # (F,P,C), (F,P)

To add an encoder, write its class (see `Encoder`) and one line in `ENCODERS`. Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from encoders.errors import EncoderError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from encoders.base import Encoder

__all__ = ["ENCODERS", "EncoderError", "build_encoder", "check_options"]

# name in a config -> "module:class", imported when it is built
ENCODERS: dict[str, str] = {
    "open_clip": "encoders.vision_open_clip:OpenClipEncoder",
    "clip": "encoders.vision:ClipEncoder",
    "siglip": "encoders.vision:SiglipEncoder",
    "siglip2": "encoders.vision:SiglipEncoder",
    "siglip2_naflex": "encoders.vision_naflex:NaflexEncoder",
    "dinov2": "encoders.vision:Dinov2Encoder",
    "dinov3": "encoders.vision:Dinov3Encoder",
    "beats": "encoders.audio:BeatsEncoder",
    "ast": "encoders.audio_ast:AstEncoder",
    "clap": "encoders.audio_clap:ClapEncoder",
    "whisper": "encoders.speech:WhisperEncoder",
    "wav2vec2": "encoders.speech_wav2vec2:Wav2Vec2Encoder",
    "hubert": "encoders.speech_wav2vec2:HubertEncoder",
    "wavlm": "encoders.speech_wav2vec2:WavLMEncoder",
}


def build_encoder(name: str, path: str | Path, **options: Any) -> Encoder:
    """The frozen encoder `name` with the weights at `path` (a file, a folder, or a hub name), on the CPU.

    `options` are the keyword arguments of its class (all have `dtype` and `max_batch`). Raises EncoderError for an
    unknown name or option, for weights that are missing, broken or of another architecture, and for bad values.
    """
    return check_options(name, options)(path, **options)  # type: ignore[call-arg, arg-type]


def check_options(name: str, options: Mapping[str, Any]) -> type[Encoder]:
    """The class of an encoder. Raises EncoderError for an unknown name, or options that are none of its own."""
    import importlib

    from encoders.options import option_problems

    if name not in ENCODERS:
        raise EncoderError(f"unknown encoder '{name}'{nearest(name, ENCODERS)}")
    module, attribute = ENCODERS[name].split(":")
    encoder_class: type[Encoder] = getattr(importlib.import_module(module), attribute)
    if problems := option_problems(options, encoder_class):
        raise EncoderError(f"encoder '{name}' " + "; ".join(problems))
    return encoder_class
