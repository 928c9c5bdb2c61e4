"""Sound: BEATs as a frozen encoder of windows of 16 kHz sound.

A segment keeps the patches that the published model gives it alone: whole rows of 16 frames (8 patches each), at least
one row. So 1 s = 98 frames = 6 rows = 48 patches, whatever stands beside it in a batch, and the last frames of a
segment that do not fill a row (less than 0.16 s) carry no token of their own.

Cost: see `encoders/beats.py`; the gated attention bias takes max_batch * heads * P^2 numbers.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from encoders.base import Features, parse_dtype
from encoders.beats import load_beats
from encoders.fbank import HOP, WINDOW, num_frames
from encoders.layers import Layers, choose_layers, join_states
from encoders.waveform import WaveformEncoder, true_lengths


class BeatsEncoder(WaveformEncoder):
    """The patches of a BEATs checkpoint: the published `.pt`, or a `.safetensors` of `mokamm convert`.

    `layer`: 0 is what the first layer reads, 12 (or -1) what the last one gives; there is no final norm.
    """

    def __init__(self, path: str | Path, *, layer: Layers = -1, dtype: str = "float32", max_batch: int = 64) -> None:
        super().__init__(options={"layer": layer}, max_batch=max_batch)
        self.model = load_beats(path)
        self.model.predictor = None  # the tagging head plays no part
        self.layers = choose_layers(layer, self.model.cfg.encoder_layers)
        self.width = self.model.cfg.encoder_embed_dim * len(self.layers)
        self.freeze(parse_dtype(dtype))

    def count(self, length: int) -> int:
        rows = num_frames(length) // self.model.cfg.input_patch_size
        return max(1, rows) * self.model.frequency_rows

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> normalised filter bank (F,T,128), and samples (F,) up to the end of each segment's last whole row."""
        lengths = true_lengths(segments, lengths)
        frames = 1 + (lengths - WINDOW).div(HOP, rounding_mode="floor")
        rows = (frames // self.model.cfg.input_patch_size).clamp_min(1)
        return self.model.fbank(segments, lengths), rows * self.model.row_samples

    def forward(self, fbank: Tensor, lengths: Tensor) -> Features:
        states, mask = self.model.hidden_states(fbank, lengths)
        return Features(join_states(states, self.layers), mask)
