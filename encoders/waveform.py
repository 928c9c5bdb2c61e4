"""What all encoders of sound share: the true length of each segment decides what is a token.

Legend: F segments, S audio samples, P patches, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encoders.base import SAMPLE_RATE, Encoder, EncoderError, Extent, Features
from encoders.layers import join_states


class WaveformEncoder(Encoder):
    """An encoder of mono sound at 16 kHz. A subclass answers `count` in the place of `num_tokens`."""

    modality_kind = "waveform"

    def count(self, length: int) -> int:
        """Valid patches of a segment with that many valid samples; at least one."""
        raise NotImplementedError

    def num_tokens(self, extent: Extent = None) -> int:
        if not isinstance(extent, int):
            raise EncoderError(f"{type(self).__name__} reads waveforms: num_tokens needs a number of samples")
        return self.count(extent)


def true_lengths(segments_FS: Tensor, lengths: Tensor | None) -> Tensor:
    """The valid samples (F,) of each segment; without `lengths` all of them."""
    if lengths is not None:
        return lengths
    return torch.full((len(segments_FS),), segments_FS.shape[1], dtype=torch.int64, device=segments_FS.device)


def silenced(segments_FS: Tensor, lengths: Tensor) -> Tensor:
    """Zeros past each segment's valid samples, so that what lies there cannot matter."""
    return segments_FS * (torch.arange(segments_FS.shape[1], device=segments_FS.device) < lengths[:, None])


def features_of(states: Sequence[Tensor], chosen: Sequence[int], counts: Tensor) -> Features:
    """The chosen hidden states (F,P,C), of which the first `counts` (F,) positions of each segment are real."""
    features = join_states(states, chosen)
    return Features(features, torch.arange(features.shape[1], device=features.device) < counts[:, None])


def states_of(output: Any) -> tuple[Tensor, ...]:
    """The hidden states of a transformers model, of which the last is its output: after a final norm, if it has one."""
    return (*output.hidden_states[:-1], output.last_hidden_state)


def check_mel_bins(made: int, read: int, path: object) -> None:
    """Raises EncoderError where a checkpoint's preprocessing is not that of its network."""
    if made != read:
        raise EncoderError(f"'{path}': preprocessor_config.json gives {made} mel bins, the network reads {read}")


def check_rate(rate: int, path: object) -> None:
    """Raises EncoderError for a network that was trained on sound of another rate than ours."""
    if rate != SAMPLE_RATE:
        raise EncoderError(f"'{path}' reads sound at {rate} Hz; mokamm's is at {SAMPLE_RATE} Hz")
