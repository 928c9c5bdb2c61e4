"""Sound: BEATs as a frozen encoder of windows of 16 kHz sound.

A segment keeps the patches that the published model gives it alone: whole rows of 16 frames (8 patches each), at least
one row. So 1 s = 98 frames = 6 rows = 48 patches, whatever stands beside it in a batch, and the last frames of a
segment that do not fill a row (less than 0.16 s) carry no token of their own.

Cost: see `encoders/beats.py`; the gated attention bias takes max_batch * heads * P^2 numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from encoders.base import Encoder, EncoderError, Features, parse_dtype
from encoders.beats import load_beats
from encoders.fbank import HOP, WINDOW, num_frames


class BeatsEncoder(Encoder):
    """The last layer's patches of a BEATs checkpoint: the published `.pt`, or a `.safetensors` of `save_beats`."""

    modality_kind = "waveform"

    def __init__(self, path: str | Path, *, dtype: str = "float32", max_batch: int = 64) -> None:
        super().__init__(max_batch=max_batch)
        self.model = load_beats(path)
        self.model.predictor = None  # the tagging head plays no part
        self.width = self.model.cfg.encoder_embed_dim
        self.freeze(parse_dtype(dtype))

    def num_tokens(self, length: int | None = None) -> int:
        if length is None:
            raise EncoderError("BEATs reads waveforms: num_tokens needs a number of samples")
        rows = num_frames(length) // self.model.cfg.input_patch_size
        return max(1, rows) * self.model.frequency_rows

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> normalised filter bank (F,T,128), and samples (F,) up to the end of each segment's last whole row."""
        if lengths is None:
            lengths = torch.full((len(segments),), segments.shape[1], device=segments.device)
        frames = 1 + (lengths - WINDOW).div(HOP, rounding_mode="floor")
        rows = (frames // self.model.cfg.input_patch_size).clamp_min(1)
        return self.model.fbank(segments, lengths), rows * self.model.row_samples

    def forward(self, fbank: Tensor, lengths: Tensor) -> Features:
        return Features(*self.model.from_fbank(fbank, lengths))
