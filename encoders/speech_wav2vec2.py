"""Speech: wav2vec 2.0, HuBERT and WavLM through transformers.

They read the waveform itself: a stack of unpadded convolutions gives a position for every 20 ms whose 25 ms are all
sound, so a segment has floor((length - kernel) / stride) + 1 of them, convolution by convolution (1 s: 49); one that is
shorter than the stack's reach (400 samples) is padded to it. Each segment is normalised over its own true length where
its feature extractor says so. Any length is read; 20 s is the longest that the models were trained on, and the length
of the windows that longer speech is cut into where the config names none.

Two kinds of checkpoints exist. With layer norm in the convolutions (most large ones) a batch is padded and masked, and
gives each segment the features that it has alone. With a group norm over time (most base ones) padding would reach
into every feature, whatever the mask: there, segments are encoded by equal length.

Cost: linear in the sound's length, quadratic beyond some 10 s; by equal length, one call for each length in the batch.

Legend: F segments, S samples, P positions (50 a second), C width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.base import SAMPLE_RATE, Features, parse_dtype
from encoders.layers import Layers, choose_layers
from encoders.pretrained import drop_unread_blocks, load_model, read
from encoders.waveform import WaveformEncoder, check_rate, features_of, silenced, states_of, true_lengths

# SpecAugment's vector is for training only, and some published checkpoints lack it
BARE: dict[str, Any] = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}


class Wav2Vec2Encoder(WaveformEncoder):
    """wav2vec 2.0. `layer` counts hidden states; -1 is the model's output, after its final norm where it has one."""

    classes: ClassVar[dict[str, str]] = {"wav2vec2": "Wav2Vec2Model"}
    # an adapter, which some carry behind the blocks, would shorten their output for another network
    bare: ClassVar[dict[str, Any]] = {**BARE, "add_adapter": False}
    window_samples = 20 * SAMPLE_RATE

    def __init__(self, path: str | Path, *, layer: Layers = -1, dtype: str = "float32", max_batch: int = 16) -> None:
        from transformers import Wav2Vec2FeatureExtractor

        super().__init__(options={"layer": layer}, max_batch=max_batch)
        what = next(iter(self.classes))
        self.model = load_model(path, self.classes, what, **self.bare)
        extractor = read(Wav2Vec2FeatureExtractor.from_pretrained, path, f"{what} preprocessor_config.json")
        check_rate(extractor.sampling_rate, path)
        config = self.model.config
        self.normalised = bool(extractor.do_normalize)
        self.by_length = config.feat_extract_norm == "group"
        self.convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.least_samples = 1
        for kernel, stride in reversed(self.convolutions):
            self.least_samples = (self.least_samples - 1) * stride + kernel
        self.layers = choose_layers(layer, config.num_hidden_layers)
        drop_unread_blocks(self.model, config.num_hidden_layers, self.layers)
        self.width = config.hidden_size * len(self.layers)
        self._options["preprocessing"] = self.normalised
        self.freeze(parse_dtype(dtype))

    def count(self, length: int) -> int:
        frames = max(length, self.least_samples)
        for kernel, stride in self.convolutions:
            frames = (frames - kernel) // stride + 1
        return frames

    def encode(self, segments: Tensor, lengths: Tensor | None = None) -> Features:
        """As `Encoder.encode`; with a group norm, one call for each distinct length."""
        if not self.by_length or lengths is None or len(segments) == 0:
            return super().encode(segments, lengths)
        self._check(segments, lengths)
        segments = segments.to(self.device, non_blocking=True)
        longest = self.count(int(lengths.max()))
        features = torch.zeros(len(segments), longest, self.width, dtype=self.dtype, device=self.device)
        mask = torch.zeros(len(segments), longest, dtype=torch.bool, device=self.device)
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero().flatten()
            part = super().encode(segments[rows.to(self.device), :length], lengths[rows])
            features[rows, : part.mask.shape[1]], mask[rows, : part.mask.shape[1]] = part
        return Features(features, mask)

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> normalised waveforms (F,S), and their valid samples (F,), at least the convolutions' reach."""
        lengths = true_lengths(segments, lengths)
        waves = silenced(segments, lengths)
        if self.normalised:
            size = lengths.clamp_min(1)[:, None]
            centred = silenced(waves - waves.sum(1, keepdim=True) / size, lengths)
            waves = centred / (centred.square().sum(1, keepdim=True) / size + 1e-7).sqrt()
        waves = F.pad(waves, (0, max(0, self.least_samples - waves.shape[1])))
        return waves, lengths.clamp_min(self.least_samples)

    def forward(self, waves: Tensor, lengths: Tensor) -> Features:
        counts = lengths
        for kernel, stride in self.convolutions:
            counts = (counts - kernel).div(stride, rounding_mode="floor") + 1
        mask = None
        if not self.by_length:
            mask = (torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]).long()
        output = self.model(waves.to(self.dtype), attention_mask=mask, output_hidden_states=True)
        return features_of(states_of(output), self.layers, counts)


class HubertEncoder(Wav2Vec2Encoder):
    """HuBERT (arXiv 2106.07447)."""

    classes = {"hubert": "HubertModel"}  # noqa: RUF012
    bare: ClassVar[dict[str, Any]] = BARE


class WavLMEncoder(Wav2Vec2Encoder):
    """WavLM (arXiv 2110.13900)."""

    classes = {"wavlm": "WavLMModel"}  # noqa: RUF012
