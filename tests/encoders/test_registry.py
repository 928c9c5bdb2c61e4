"""Encoders by name; adding one is one class and one registry line, shown here."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from encoders import ENCODERS, EncoderError, build_encoder
from encoders.base import Encoder, Features

ROOT = Path(__file__).parents[2]


class Loudness(Encoder):
    """A whole encoder: the energy of each 10 ms, as C copies."""

    modality_kind = "waveform"

    def __init__(self, path: str | Path, *, copies: int = 4, max_batch: int = 64) -> None:
        super().__init__(options={"copies": copies}, max_batch=max_batch)
        self.width = copies
        self.gain = nn.Parameter(torch.full((copies,), float(path)))
        self.freeze()

    def num_tokens(self, length: int | None = None) -> int:
        return max(1, (length or 0) // 160)

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
        assert lengths is not None
        return segments.unfold(1, 160, 160).square().sum(-1), (lengths // 160).clamp_min(1)

    def forward(self, energy: Tensor, counts: Tensor) -> Features:
        return Features(
            energy[..., None] * self.gain, torch.arange(energy.shape[1], device=energy.device) < counts[:, None]
        )


def test_adding_an_encoder(monkeypatch) -> None:
    monkeypatch.setitem(ENCODERS, "loudness", f"{__name__}:Loudness")
    encoder = build_encoder("loudness", "2", copies=3, max_batch=2)
    waves = torch.ones(5, 1600)
    features, mask = encoder.encode(waves, torch.tensor([1600, 320, 800, 160, 5]))
    assert features.shape == (5, 10, 3)
    assert mask.sum(1).tolist() == [10, 2, 5, 1, 1]
    assert (features[mask] == 320).all()
    assert (features[~mask] == 0).all()
    assert encoder.encode(waves[:, :480]).features.shape == (5, 3, 3)
    assert not features.requires_grad
    assert encoder.fingerprint() == build_encoder("loudness", "2", copies=3).fingerprint()
    assert encoder.fingerprint() != build_encoder("loudness", "2.5", copies=3).fingerprint()
    with pytest.raises(EncoderError, match="has no option 'copie'; did you mean 'copies'"):
        build_encoder("loudness", "2", copie=3)
    with pytest.raises(EncoderError, match="'loudness' option 'copies' should be a valid integer; found 'many'"):
        build_encoder("loudness", "2", copies="many")
    with pytest.raises(EncoderError, match="expected at least 1 segment, found 0"):
        build_encoder("loudness", "2", max_batch=0)
    with pytest.raises(EncoderError, match="expected 5 lengths, found lengths of shape"):
        encoder.encode(waves, torch.tensor([1]))


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(
        EncoderError, match="unknown encoder 'openclip'; did you mean 'open_clip'\\? known: ast, beats, clap, "
    ):
        build_encoder("openclip", "x")


def test_every_registered_class_exists() -> None:
    for name, place in ENCODERS.items():
        module, attribute = place.split(":")
        assert issubclass(getattr(importlib.import_module(module), attribute), Encoder), name


def test_every_option_of_every_encoder_has_a_type_that_can_be_checked() -> None:
    """What a wrong value is told, for each; the weights are never looked for."""
    wrong = {
        "layer": "two",
        "features": 1,
        "image_size": 0,
        "dtype": 32,
        "max_batch": "all",
        "pretrained": 3,
        "max_patches": 0,
    }
    for name, place in ENCODERS.items():
        module, attribute = place.split(":")
        signature = inspect.signature(getattr(importlib.import_module(module), attribute))
        options = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert {"dtype", "max_batch"} <= set(options), name
        for option in options:
            with pytest.raises(EncoderError, match=f"encoder '{name}' option '{option}' should be .*; found"):
                build_encoder(name, "nowhere", **{option: wrong[option]})
        with pytest.raises(EncoderError, match=f"encoder '{name}' has no option 'layr'"):
            build_encoder(name, "nowhere", layr=1)


def test_the_package_imports_nothing_heavy() -> None:
    code = "import sys, encoders; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
