"""Speech longer than an encoder's window: several windows, each of its true length, through config, loader and encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data.media import MediaLoader
from data.schema import Media, MediaError, MediaInput, UserError
from encoders import build_encoder
from mokamm.config_sections import ModalityConfig
from mokamm.perception import Perception, Sense
from mokamm.projectors import build_projector

ROOT = Path(__file__).resolve().parents[2]


def sense_of(encoder, projector, **settings) -> Sense:
    config = {"encoder": {"name": "whisper", "path": "x"}, **settings}
    return Sense.of("speech", ModalityConfig.model_validate(config), encoder, projector)


@pytest.fixture(scope="module")
def whisper():
    return build_encoder("whisper", ROOT / "mokamm" / "mini" / "speech")


def test_long_speech_becomes_windows_of_true_length(whisper, tmp_path) -> None:
    window = whisper.window_samples
    total = 2 * window + 4321
    sound = np.random.default_rng(0).normal(0, 0.1, total).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", sound, 16000, subtype="FLOAT")
    projector = build_projector("mlp", whisper.width, 16, stride=2)
    sense = sense_of(whisper, projector, segments=3)
    assert sense.seconds == window / 16000
    windows = MediaLoader(tmp_path).windows(Media("audio", "long.wav", "speech"), 3, sense.seconds, whole=sense.whole)
    assert windows.lengths.tolist() == [window, window, 4321]
    counts = [sense.tokens(sense.patches(length)) for length in windows.lengths.tolist()]
    positions = [window // 320, window // 320, 14]  # ceil(ceil(4321 / 160) / 2)
    assert counts == [-(-p // 2) for p in positions]
    item = MediaInput("speech", counts, 0, segments=windows.samples, lengths=windows.lengths)
    Perception({"speech": whisper})._encode("speech", [item])
    assert item.mask.sum(1).tolist() == positions
    for i, (start, length) in enumerate(((0, window), (window, window), (2 * window, 4321))):
        alone = whisper.encode(torch.from_numpy(sound[start : start + length])[None])
        torch.testing.assert_close(item.features[i, : positions[i]], alone.features[0], rtol=0, atol=1e-4)
    with pytest.raises(MediaError, match=r"longer than the 2 x .* raise `segments` or `seconds`"):
        MediaLoader(tmp_path).windows(Media("audio", "long.wav", "speech"), 2, sense.seconds, whole=sense.whole)


def test_a_window_that_the_encoder_cannot_read_is_refused_with_the_config(whisper) -> None:
    projector = build_projector("mlp", whisper.width, 16)
    limit = whisper.window_samples / 16000
    assert sense_of(whisper, projector, seconds=limit).seconds == limit
    with pytest.raises(UserError, match=f"speech.seconds is {limit + 1:g}, but encoder 'whisper' reads windows of at"):
        sense_of(whisper, projector, seconds=limit + 1)
