"""AST and CLAP's audio tower against transformers called plainly with its own feature extractors, on tiny random
checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

from encoders import EncoderError, build_encoder

LENGTHS = [20480, 20000, 9001, 4960, 640, 399, 1]  # of samples; 20480 is AST's window here


def randomise(model) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)


def waves(lengths=LENGTHS, samples=20480) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(len(lengths), samples) * 0.1, torch.tensor(lengths)  # garbage past the lengths


def alone_equals_batch(encoder, segments, lengths, atol: float) -> None:
    features, mask = encoder.encode(segments, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = encoder.encode(segments[i : i + 1, :length])
        count = encoder.num_tokens(length)
        assert mask[i].sum() == count == alone.mask.sum() == mask[i, :count].sum()
        assert (features[i, count:] == 0).all()
        torch.testing.assert_close(features[i, :count], alone.features[0], rtol=0, atol=atol)


# ---- AST ----


@pytest.fixture(scope="module")
def ast(tmp_path_factory):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    folder = tmp_path_factory.mktemp("ast")
    config = ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_length=128, num_labels=3
    )
    model = ASTForAudioClassification(config)  # as published: with a head that plays no part here
    randomise(model)
    model.save_pretrained(folder)
    ASTFeatureExtractor(max_length=128).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [-1, 0, [0, 1]])
def test_ast_equals_transformers(ast, layer) -> None:
    from transformers import ASTFeatureExtractor, ASTModel

    segments, lengths = waves()
    cut = [
        wave[: max(length, 400)] * (torch.arange(max(length, 400)) < length)
        for wave, length in zip(segments, LENGTHS, strict=True)
    ]
    extractor = ASTFeatureExtractor.from_pretrained(ast)
    inputs = extractor([sound.numpy() for sound in cut], sampling_rate=16000, return_tensors="pt")["input_values"]
    encoder = build_encoder("ast", ast, layer=layer, max_batch=3)
    fbank, _ = encoder.preprocess(segments, lengths)
    torch.testing.assert_close(fbank, inputs, rtol=0, atol=1e-4)
    with torch.no_grad():
        output = ASTModel.from_pretrained(ast).eval()(inputs, output_hidden_states=True)
    states = (*output.hidden_states[:-1], output.last_hidden_state)
    expected = torch.cat([states[k] for k in ([layer] if isinstance(layer, int) else layer)], dim=-1)
    features, mask = encoder.encode(segments, lengths)
    assert encoder.width == expected.shape[-1]
    # by hand: rows of 16 frames every 10, wholly within the true frames
    frames = [max(0, 1 + (length - 400) // 160) for length in LENGTHS]
    rows = [max(1, sum(10 * t + 16 <= n for t in range(12))) for n in frames]
    assert mask.sum(1).tolist() == [12 * n for n in rows] == [encoder.num_tokens(length) for length in LENGTHS]
    for i, count in enumerate(rows):
        for t in range(count):
            for f in range(12):  # theirs: class, distillation, then all times of frequency 0, of 1, ...
                torch.testing.assert_close(features[i, 12 * t + f], expected[i, 2 + f * 12 + t], rtol=0, atol=2e-4)
    cls = build_encoder("ast", ast, layer=layer, features="cls").encode(segments, lengths)
    torch.testing.assert_close(cls.features, expected[:, :1], rtol=0, atol=2e-4)
    alone_equals_batch(encoder, segments, lengths, atol=1e-4)


def test_the_published_ast_gives_12_rows_every_tenth_of_a_second() -> None:
    from encoders.audio_ast import AstEncoder

    encoder = AstEncoder.__new__(AstEncoder)  # the shapes alone: no weights at hand
    values = {"frames": 1024, "patch": 16, "stride": 10, "frequency_rows": 12, "which": "patch"}
    encoder.__dict__.update(values)
    assert [encoder.num_tokens(seconds * 16000) // 12 for seconds in (1, 2, 5, 10)] == [9, 19, 49, 99]


@pytest.mark.parametrize("name", ["ast", "clap"])
def test_num_tokens_is_the_mask_at_many_lengths(name: str, ast, clap) -> None:
    encoder = build_encoder(name, {"ast": ast, "clap": clap}[name])
    borders = [400 + 160 * n + d for n in range(8, 60, 7) for d in (-1, 0)] + [
        500 * n + d for n in (1, 7) for d in (0, 1)
    ]
    lengths = torch.tensor([1, 2, *borders, 15999, 16000])
    _, counts = encoder.preprocess(torch.zeros(len(lengths), 16000), lengths)
    assert counts.tolist() == [encoder.num_tokens(length) for length in lengths.tolist()]


@pytest.mark.parametrize("name", ["ast", "clap"])
def test_half_precision(name: str, ast, clap) -> None:
    segments, lengths = waves([16000, 5000], 16000)
    full, half = (
        build_encoder(name, {"ast": ast, "clap": clap}[name], dtype=dtype).encode(segments, lengths)
        for dtype in ("float32", "bfloat16")
    )
    assert half.features.dtype == torch.bfloat16
    assert torch.equal(full.mask, half.mask)
    assert (half.features.float() - full.features).abs().mean() < 0.05 * full.features.abs().mean()


@pytest.mark.parametrize("name", ["ast", "clap"])
def test_a_checkpoint_that_lacks_a_weight(name: str, ast, clap, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    for file in {"ast": ast, "clap": clap}[name].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if "patch_embed" in key)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match=f"is not a whole {name} checkpoint: 1 weights missing .*patch_embed"):
        build_encoder(name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(EncoderError, match=f"{name} weights could not be read from"):
        build_encoder(name, tmp_path)


def test_ast_mistakes(ast, tmp_path) -> None:
    encoder = build_encoder("ast", ast)
    with pytest.raises(EncoderError, match=r"segments of at most 1.28 s, found 2 s; set the modality's `seconds`"):
        encoder.encode(torch.zeros(1, 32000))
    with pytest.raises(EncoderError, match="num_tokens needs a number of samples"):
        encoder.num_tokens()
    with pytest.raises(EncoderError, match="layer -4: this encoder has hidden states 0 to 2"):
        build_encoder("ast", ast, layer=-4)
    for file in ast.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    extractor = json.loads((ast / "preprocessor_config.json").read_text())
    for change, message in (
        ({"max_length": 64}, "max_length is 64 in preprocessor_config.json and 128 in config.json"),
        ({"sampling_rate": 8000}, "reads sound at 8000 Hz"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor | change))
        with pytest.raises(EncoderError, match=message):
            build_encoder("ast", tmp_path)
    with pytest.raises(EncoderError, match="is no clap model: its model_type is audio-spectrogram-transformer"):
        build_encoder("clap", ast)


# ---- CLAP ----


def write_clap(folder, padding: str = "repeatpad", **audio):
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tower = {
        "spec_size": 64, "num_mel_bins": 16, "window_size": 2, "patch_embeds_hidden_size": 8, "hidden_size": 16,
        "depths": [1, 1], "num_attention_heads": [2, 2], "num_hidden_layers": 2, "mlp_ratio": 1.5, **audio,
    }  # fmt: skip
    torch.manual_seed(0)
    config = ClapConfig(
        text_config={**text, "vocab_size": 30, "max_position_embeddings": 16}, audio_config=tower, projection_dim=8
    )
    model = ClapModel(config)
    model.audio_model.audio_encoder.batch_norm.running_mean.normal_(-40, 5)
    model.audio_model.audio_encoder.batch_norm.running_var.fill_(300.0)
    model.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16, max_length_s=1, hop_length=480, truncation="rand_trunc", padding=padding
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    return write_clap(tmp_path_factory.mktemp("clap"))


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_clap_equals_transformers(tmp_path, padding: str) -> None:
    from torchaudio.functional import resample
    from transformers import ClapFeatureExtractor, ClapModel

    folder = write_clap(tmp_path, padding)
    lengths = [16000, 15000, 7000, 3001, 500, 1]
    segments, true = waves(lengths, 16000)
    high = [resample(wave[:length], 16000, 48000).numpy() for wave, length in zip(segments, lengths, strict=True)]
    inputs = ClapFeatureExtractor.from_pretrained(folder)(high, sampling_rate=48000, return_tensors="pt")
    encoder = build_encoder("clap", folder, max_batch=4)
    mel, _ = encoder.preprocess(segments, true)
    torch.testing.assert_close(mel, inputs["input_features"].float(), rtol=0, atol=2e-2)  # decibels, down to -100
    with torch.no_grad():
        tower = ClapModel.from_pretrained(folder).eval().audio_model
        grid = tower(input_features=inputs["input_features"].float()).last_hidden_state
    assert grid.shape[1:] == (16, 2, 32)  # width, frequency rows, columns of 1/32 s
    features, mask = encoder.encode(segments, true)
    columns = [-(-length * 32 // 16000) for length in lengths]
    assert mask.sum(1).tolist() == [2 * n for n in columns] == [encoder.num_tokens(n) for n in lengths]
    for i, count in enumerate(columns):
        for t in range(count):
            for f in range(2):
                torch.testing.assert_close(features[i, 2 * t + f], grid[i, :, f, t], rtol=0, atol=1e-3)
    assert (encoder.width, encoder.window_samples) == (16, 16000)
    alone_equals_batch(encoder, segments, true, atol=1e-3)


def test_claps_columns_run_in_time(clap) -> None:
    """Silence then a loud second half: what changes are the columns of that half (windows see a little beyond)."""
    encoder = build_encoder("clap", clap)
    quiet = torch.zeros(1, 16000)
    loud = quiet.clone()
    loud[0, 12000:] = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    change = (encoder.encode(loud).features - encoder.encode(quiet).features)[0].norm(dim=-1).reshape(32, 2).sum(1)
    assert change[24:].min() > 100 * change[:16].max()


def test_clap_mistakes(clap, tmp_path) -> None:
    with pytest.raises(EncoderError, match=r"found 1.5 s; set the modality's `seconds`"):
        build_encoder("clap", clap).encode(torch.zeros(1, 24000))
    folder = write_clap(tmp_path, enable_fusion=True)
    with pytest.raises(EncoderError, match="is a fused CLAP, which is not read; take laion/clap-htsat-unfused"):
        build_encoder("clap", folder)
