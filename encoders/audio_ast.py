"""Sound: the Audio Spectrogram Transformer (arXiv 2104.01778) through transformers.

It reads one fixed window (10.24 s in the published models) of overlapping 16x16 patches, one row of 12 every 10 frames.
As its feature extractor does, a shorter segment is padded with zeros *in the filter bank* and encoded whole; the mask
then keeps the rows of patches that lie within the true sound, at least one row. So 1 s = 98 frames = 9 rows = 108
patches. transformers orders patches by frequency first; here they are reordered by time, so that real ones come first.

Cost: one full window (1214 positions) per segment, however short: prefer few long windows to many short ones.

Legend: F segments, S samples, T frames of 10 ms, P patches, C width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.base import EncoderError, Features, parse_dtype
from encoders.fbank import HOP, MEL_BINS, WINDOW, kaldi_fbank, num_frames
from encoders.layers import Layers, check_features, choose_layers
from encoders.pretrained import drop_unread_blocks, load_model, read
from encoders.waveform import WaveformEncoder, check_rate, features_of, silenced, states_of, true_lengths

SPECIAL = 2  # the class token and the distillation token stand before the patches


class AstEncoder(WaveformEncoder):
    """`layer` counts hidden states; -1 is the model's output, after the final norm. `features`: patch, or cls."""

    def __init__(
        self,
        path: str | Path,
        *,
        layer: Layers = -1,
        features: str = "patch",
        dtype: str = "float32",
        max_batch: int = 16,
    ) -> None:
        from transformers import ASTFeatureExtractor

        super().__init__(options={"layer": layer, "features": features}, max_batch=max_batch)
        self.which = check_features(features)
        self.model = load_model(path, {"audio-spectrogram-transformer": "ASTModel"}, "ast")
        extractor = read(ASTFeatureExtractor.from_pretrained, path, "ast preprocessor_config.json")
        check_rate(extractor.sampling_rate, path)
        config = self.model.config
        for key in ("max_length", "num_mel_bins"):
            expected = MEL_BINS if key == "num_mel_bins" else config.max_length
            if not getattr(extractor, key) == expected == getattr(config, key):
                raise EncoderError(
                    f"'{path}': {key} is {getattr(extractor, key)} in preprocessor_config.json and "
                    f"{getattr(config, key)} in config.json; expected {expected} in both"
                )
        self.norm = (extractor.mean, extractor.std) if extractor.do_normalize else (0.0, 0.5)
        self.layers = choose_layers(layer, config.num_hidden_layers)
        drop_unread_blocks(self.model, config.num_hidden_layers, self.layers)
        self.width = config.hidden_size * len(self.layers)
        self.frames, self.patch, self.stride = config.max_length, config.patch_size, config.time_stride
        self.frequency_rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        self.window_samples = self.max_samples = self.frames * HOP
        self._options["preprocessing"] = self.norm
        self.freeze(parse_dtype(dtype))

    def count(self, length: int) -> int:
        frames = min(num_frames(length), self.frames)
        return 1 if self.which == "cls" else max(1, (frames - self.patch) // self.stride + 1) * self.frequency_rows

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> normalised filter bank (F,T,128) of the whole window, and valid patches (F,)."""
        lengths = true_lengths(segments, lengths)
        segments = F.pad(silenced(segments, lengths), (0, max(0, WINDOW - segments.shape[1])))
        fbank = kaldi_fbank(segments, window_power=1.0)
        frames = (1 + (lengths - WINDOW).div(HOP, rounding_mode="floor")).clamp(1, self.frames)
        real = torch.arange(fbank.shape[1], device=fbank.device) < frames[:, None]
        fbank = F.pad(fbank.masked_fill(~real[..., None], 0.0), (0, 0, 0, self.frames - fbank.shape[1]))
        rows = 1 + (frames - self.patch).clamp_min(0) // self.stride
        mean, std = self.norm
        return (fbank - mean) / (2 * std), rows * self.frequency_rows

    def forward(self, fbank: Tensor, counts: Tensor) -> Features:
        output = self.model(fbank.to(self.dtype), output_hidden_states=True)
        states = states_of(output)
        if self.which == "cls":
            return features_of([state[:, :1] for state in states], self.layers, torch.ones_like(counts))
        return features_of([self.by_time(state[:, SPECIAL:]) for state in states], self.layers, counts)

    def by_time(self, state_FPC: Tensor) -> Tensor:
        """Patches ordered by frequency, then time -> by time, then frequency."""
        return state_FPC.unflatten(1, (self.frequency_rows, -1)).transpose(1, 2).flatten(1, 2)
