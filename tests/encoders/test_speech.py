"""Whisper's encoder against transformers called directly, on a tiny random model."""

from __future__ import annotations

import json

import pytest
import torch

from encoders.base import EncoderError
from encoders.speech import WhisperEncoder

WINDOW = 2 * 50 * 160  # 50 positions: one second


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2))
    }
    config = WhisperConfig(
        vocab_size=60,
        d_model=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=50,
        num_mel_bins=80,
        **sizes,
    )
    path = tmp_path_factory.mktemp("whisper")
    for token in ("pad", "bos", "eos", "decoder_start"):
        setattr(config, f"{token}_token_id", 1)
    WhisperForConditionalGeneration(config).save_pretrained(path)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(path)
    return path


@pytest.mark.parametrize("layer", [-1, 1, 0])
def test_equals_transformers_at_true_lengths(folder, layer: int) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(1)
    lengths = torch.tensor([16000, 9001, 640, 321, 1])
    waves = torch.randn(5, 16000) * 0.1
    cut = [wave[:length].numpy() for wave, length in zip(waves, lengths.tolist(), strict=True)]
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    mel = extractor(cut, sampling_rate=16000, max_length=WINDOW, return_tensors="pt", return_attention_mask=True)
    encoder = WhisperEncoder(folder, layer=layer, max_batch=2)
    found_mel, positions = encoder.preprocess(waves, lengths)
    torch.testing.assert_close(found_mel, mel["input_features"], rtol=0, atol=1e-5)
    assert positions.tolist() == [-(-int(frames) // 2) for frames in mel["attention_mask"].sum(1)] == [50, 29, 2, 2, 1]
    with torch.no_grad():
        model = WhisperModel.from_pretrained(folder).eval().encoder
        expected = model(mel["input_features"], output_hidden_states=True).hidden_states[layer]
    features, mask = encoder.encode(waves, lengths)
    assert features.shape == (5, 50, 16)
    assert len(encoder.model.layers) == (1 if layer == 0 else 2)
    for i, count in enumerate(positions.tolist()):
        assert mask[i].sum() == count == encoder.num_tokens(int(lengths[i]))
        torch.testing.assert_close(features[i, :count], expected[i, :count], rtol=0, atol=1e-4)
        assert (features[i, count:] == 0).all()


def test_a_whole_whisper_is_read_without_a_word_of_its_decoder(folder, caplog) -> None:
    from transformers.utils import logging

    logging.enable_propagation()  # to caplog
    before = logging.get_verbosity()
    try:
        WhisperEncoder(folder)
    finally:
        logging.disable_propagation()
    assert not caplog.records
    assert logging.get_verbosity() == before


def test_short_batches_are_cut(folder) -> None:
    encoder = WhisperEncoder(folder)
    short = encoder.encode(torch.randn(2, 16000) * 0.1, torch.tensor([3200, 1600]))
    assert short.features.shape == (2, 10, 16)
    assert short.mask.sum(1).tolist() == [10, 5]
    assert encoder.num_tokens(10**6) == 50
    assert encoder.width == 16
    assert not any("decoder" in name for name in encoder.state_dict())


def test_half_precision_keeps_the_spectrogram_exact(folder) -> None:
    full, half = WhisperEncoder(folder), WhisperEncoder(folder, dtype="bfloat16")
    waves = torch.randn(1, 16000) * 0.1
    assert torch.equal(full.preprocess(waves, None)[0], half.preprocess(waves, None)[0])
    assert half.encode(waves).features.dtype == torch.bfloat16
    assert full.fingerprint() != half.fingerprint()


def test_errors(folder, tmp_path) -> None:
    encoder = WhisperEncoder(folder)
    with pytest.raises(EncoderError, match=r"expected segments of at most 1 s, found 1.5 s; set .*seconds"):
        encoder.encode(torch.zeros(1, 24000))
    with pytest.raises(EncoderError, match="layer 3: this encoder has hidden states 0 to 2"):
        WhisperEncoder(folder, layer=3)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    extractor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor | {"feature_size": 128}))
    with pytest.raises(EncoderError, match="gives 128 mel bins, the network reads 80"):
        WhisperEncoder(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"preprocessor_config.json could not be read"):
        WhisperEncoder(tmp_path)
