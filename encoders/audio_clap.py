"""Sound: the audio tower of CLAP (HTS-AT, a Swin transformer over a mel spectrogram) through transformers.

It reads one fixed window of 10 s at 48 kHz. As its feature extractor does, a shorter segment is repeated as often as it
fits into the window, and the rest is silence; the mask then keeps the columns of the first copy, rounded up. The
published towers give 32 columns of 2 frequency rows for 10 s, ordered by time here: 1 s is 4 columns, 8 patches. Our
sound is at 16 kHz and is resampled, so the network hears nothing above 8 kHz. Only the last stage is offered, because
the stages differ in their grids. Fused towers (laion/clap-htsat-fused) choose among random crops and are refused.

Cost: one full window per segment, however short.

Legend: F segments, S samples, M mel bins, T mel frames (100 a second), P patches, C width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from encoders.base import SAMPLE_RATE, EncoderError, Features, parse_dtype
from encoders.pretrained import load_model, read
from encoders.waveform import WaveformEncoder, check_mel_bins, features_of, silenced, true_lengths


class ClapEncoder(WaveformEncoder):
    """The last stage's patches, after the final norm."""

    mel_filters: Tensor

    def __init__(self, path: str | Path, *, dtype: str = "float32", max_batch: int = 16) -> None:
        from transformers import ClapFeatureExtractor

        super().__init__(max_batch=max_batch)
        # the text tower beside it is left unread
        self.model = load_model(path, {"clap": "ClapAudioModel"}, "clap", key_mapping={r"^audio_model\.": ""})
        config = self.model.config
        if config.enable_fusion:
            raise EncoderError(
                f"'{path}' is a fused CLAP, which is not read; take laion/clap-htsat-unfused or its like"
            )
        extractor = read(ClapFeatureExtractor.from_pretrained, path, "clap preprocessor_config.json")
        check_mel_bins(extractor.feature_size, config.num_mel_bins, path)
        self.rate, self.hop, self.fft = extractor.sampling_rate, extractor.hop_length, extractor.fft_window_size
        self.padding, self.window = extractor.padding, extractor.nb_max_samples
        self.window_samples = self.max_samples = int(extractor.max_length_s * SAMPLE_RATE)
        encoder = self.model.audio_encoder
        shrink = 2 ** (encoder.num_layers - 1)
        self.frequency_rows, time = (config.spec_size // shrink // stride for stride in encoder.patch_stride)
        self.frequency_rows //= encoder.freq_ratio
        self.columns, self.width = time * encoder.freq_ratio, encoder.num_features
        filters = extractor.mel_filters if extractor.truncation == "fusion" else extractor.mel_filters_slaney
        self._options["preprocessing"] = extractor.to_json_string()
        self.freeze(parse_dtype(dtype))
        # float32 whatever the weights' dtype, hence after freeze
        self.register_buffer("mel_filters", torch.from_numpy(filters).float().T.contiguous(), persistent=False)

    def count(self, length: int) -> int:
        return min(self.columns, max(1, -(-length * self.columns // self.window_samples))) * self.frequency_rows

    def preprocess(self, segments: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> log-mel spectrogram (F,1,T,M) of the whole window, and valid patches (F,)."""
        lengths = true_lengths(segments, lengths)
        columns = (lengths * self.columns + self.window_samples - 1) // self.window_samples
        mel = self.log_mel(self.fill_window(silenced(segments, lengths), lengths))
        return mel[:, None], columns.clamp(1, self.columns) * self.frequency_rows

    def fill_window(self, segments_FS: Tensor, lengths: Tensor) -> Tensor:
        """Resample to the network's rate, and fill the window with each segment as the extractor's `padding` says."""
        from torchaudio.functional import resample

        sound = resample(segments_FS, SAMPLE_RATE, self.rate)
        size = ((lengths * self.rate + SAMPLE_RATE - 1) // SAMPLE_RATE).clamp(1, self.window)[:, None]
        end = {"repeat": self.window + size, "repeatpad": self.window // size * size}.get(self.padding, size)
        place = torch.arange(self.window, device=sound.device)
        return sound.gather(1, place % size) * (place < end)

    def log_mel(self, waveform_FS: Tensor) -> Tensor:
        """ClapFeatureExtractor's log-mel spectrogram in decibels (F,T,M), batched; T = 1 + S // hop."""
        window = torch.hann_window(self.fft, device=waveform_FS.device)
        spectrum = torch.stft(waveform_FS, self.fft, self.hop, window=window, return_complex=True)
        mel_FMT = self.mel_filters @ spectrum.abs().square()
        return 10.0 * mel_FMT.clamp_min(1e-10).log10().transpose(1, 2)

    def forward(self, mel: Tensor, counts: Tensor) -> Features:
        grid_FCfP = self.model(input_features=mel.to(self.dtype)).last_hidden_state  # frequency rows, then time
        return features_of([grid_FCfP.permute(0, 3, 2, 1).flatten(1, 2)], [0], counts)
