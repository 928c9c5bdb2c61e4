"""Speech: Whisper's encoder, told how long the speech really is.

Whisper reads one fixed window (30 s in the published models), so a segment is padded with silence to the window and
encoded whole; the mask then keeps one position for every 20 ms of true speech, ceil(ceil(samples / 160) / 2), and
padding never becomes a token. The log-mel spectrogram is computed for the whole batch at once on the encoder's device,
with the operations of transformers' WhisperFeatureExtractor. Longer speech comes as several windows, one segment each
(`segments` in the config says how many at most), of which only the last is padded.

Cost: one full window per segment, however short.

Legend: F segments, S samples, M mel bins, T mel frames (100 a second), P positions (50 a second), C width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.base import Features, parse_dtype
from encoders.layers import Layers, choose_layers
from encoders.pretrained import drop_unread_blocks, load_model, read
from encoders.waveform import (
    WaveformEncoder,
    check_mel_bins,
    check_rate,
    features_of,
    silenced,
    states_of,
    true_lengths,
)


class WhisperEncoder(WaveformEncoder):
    """`layer` counts hidden states; -1 is the encoder's output, after the final norm."""

    mel_filters: Tensor

    def __init__(self, path: str | Path, *, layer: Layers = -1, dtype: str = "float32", max_batch: int = 16) -> None:
        from transformers import WhisperFeatureExtractor

        super().__init__(options={"layer": layer}, max_batch=max_batch)
        # the decoder beside it is left unread
        tower = {"whisper": "models.whisper.modeling_whisper.WhisperEncoder"}
        self.model = load_model(path, tower, "whisper", key_mapping={r"^(model\.)?encoder\.": ""})
        extractor = read(WhisperFeatureExtractor.from_pretrained, path, "whisper preprocessor_config.json")
        config = self.model.config
        check_mel_bins(extractor.feature_size, config.num_mel_bins, path)
        check_rate(extractor.sampling_rate, path)
        self.layers = choose_layers(layer, config.encoder_layers)
        drop_unread_blocks(self.model, config.encoder_layers, self.layers)
        self.width = config.d_model * len(self.layers)
        self.positions, self.hop, self.fft = config.max_source_positions, extractor.hop_length, extractor.n_fft
        self.window_samples = self.max_samples = 2 * self.positions * self.hop
        self._options["mel"] = (self.hop, self.fft, extractor.sampling_rate)
        self.freeze(parse_dtype(dtype))
        # float32 whatever the weights' dtype, hence after freeze
        self.register_buffer(
            "mel_filters", torch.from_numpy(extractor.mel_filters).float().T.contiguous(), persistent=False
        )

    def count(self, length: int) -> int:
        frames = -(-length // self.hop)
        return min(max(1, -(-frames // 2)), self.positions)

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> log-mel spectrogram (F,M,T) of the whole window, and valid positions (F,)."""
        lengths = true_lengths(segments, lengths)
        frames = (lengths + self.hop - 1) // self.hop
        positions = ((frames + 1) // 2).clamp(1, self.positions)
        window = F.pad(silenced(segments, lengths), (0, self.window_samples - segments.shape[1]))
        return self.log_mel(window), positions

    def log_mel(self, waveform_FS: Tensor) -> Tensor:
        """WhisperFeatureExtractor's log-mel spectrogram (F,M,S // hop), batched."""
        window = torch.hann_window(self.fft, device=waveform_FS.device)
        spectrum = torch.stft(waveform_FS, self.fft, self.hop, window=window, return_complex=True)
        mel_FMT = self.mel_filters @ (spectrum[..., :-1].abs() ** 2)
        log_FMT = mel_FMT.clamp_min(1e-10).log10()
        return (torch.maximum(log_FMT, log_FMT.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0

    def forward(self, mel: Tensor, positions: Tensor) -> Features:
        output = self.model(mel.to(self.dtype), output_hidden_states=True)
        return features_of(states_of(output), self.layers, positions)
