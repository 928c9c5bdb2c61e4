"""wav2vec 2.0, HuBERT and WavLM against transformers called plainly, one segment at a time, on tiny random checkpoints
of both kinds (layer norm and group norm in the convolutions)."""

from __future__ import annotations

import json

import pytest
import torch

from encoders import EncoderError, build_encoder

KINDS = [f"{name}-{norm}" for name in ("wav2vec2", "hubert", "wavlm") for norm in ("layer", "group")]
LENGTHS = [9000, 8999, 4321, 9000, 720, 719, 400, 399, 1]


def write(folder, name: str, norm: str, do_normalize: bool = True, head: bool = False, **options):
    import transformers as t

    title = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}[name]
    config = getattr(t, f"{title}Config")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8,) * 7,
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", conv_bias=norm == "layer",
        num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=2, vocab_size=20, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(t, f"{title}{'ForCTC' if head else 'Model'}")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.3)
    model.save_pretrained(folder)
    extractor = t.Wav2Vec2FeatureExtractor(do_normalize=do_normalize, return_attention_mask=norm == "layer")
    extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = write(tmp_path_factory.mktemp(kind), *kind.split("-"))
        return made[kind]

    return get


def waves() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(len(LENGTHS), max(LENGTHS)) * 0.1 + 0.05, torch.tensor(LENGTHS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, 0, [0, -1, 1]])
def test_a_padded_batch_gives_each_segment_what_it_has_alone(written, kind: str, layer) -> None:
    from transformers import AutoModel, Wav2Vec2FeatureExtractor

    folder = written(kind)
    segments, lengths = waves()
    extractor, model = Wav2Vec2FeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    encoder = build_encoder(kind.split("-")[0], folder, layer=layer, max_batch=4)
    features, mask = encoder.encode(segments, lengths)
    for i, length in enumerate(LENGTHS):
        inputs = extractor(segments[i, :length].numpy(), sampling_rate=16000, return_tensors="pt")["input_values"]
        inputs = torch.nn.functional.pad(inputs, (0, max(0, 400 - length)))  # the convolutions' reach
        with torch.no_grad():
            output = model(inputs, output_hidden_states=True)
        states = (*output.hidden_states[:-1], output.last_hidden_state)
        expected = torch.cat([states[k] for k in ([layer] if isinstance(layer, int) else layer)], dim=-1)[0]
        count = int(model._get_feat_extract_output_lengths(torch.tensor(max(length, 400))))
        assert len(expected) == count == mask[i].sum() == mask[i, :count].sum() == encoder.num_tokens(length)
        torch.testing.assert_close(features[i, :count], expected, rtol=0, atol=5e-5)
        assert (features[i, count:] == 0).all()
    assert len(encoder.model.encoder.layers) == (1 if layer == 0 else 2)
    assert features.shape[2] == encoder.width == expected.shape[1]
    assert encoder.by_length == kind.endswith("group")


def test_num_tokens_is_the_models_own_formula(written) -> None:
    from transformers import AutoModel

    encoder, model = build_encoder("wavlm", written("wavlm-layer")), AutoModel.from_pretrained(written("wavlm-layer"))
    lengths = torch.cat([torch.arange(400, 3000), torch.tensor([16000, 32000, 320000, 479999, 480000])])
    expected = model._get_feat_extract_output_lengths(lengths).tolist()
    assert [encoder.num_tokens(length) for length in lengths.tolist()] == expected
    assert encoder.least_samples == 400
    assert [encoder.num_tokens(n) for n in (1, 399, 400, 719, 720, 16000)] == [1, 1, 1, 1, 2, 49]
    assert encoder.window_samples == 320000


def test_a_group_norm_would_feel_padding(written) -> None:
    """Why such checkpoints are encoded by equal length: padded in one call, the same sound has other features."""
    encoder = build_encoder("hubert", written("hubert-group"))
    segments, lengths = waves()
    right = encoder.encode(segments, lengths)
    encoder.by_length = False
    wrong = encoder.encode(segments, lengths)
    torch.testing.assert_close(wrong.features[0], right.features[0], rtol=0, atol=5e-5)  # the longest: not padded
    assert (wrong.features[2] - right.features[2])[right.mask[2]].abs().max() > 0.01


def test_without_normalisation(tmp_path) -> None:
    from transformers import AutoModel

    folder = write(tmp_path, "wavlm", "layer", do_normalize=False)
    segments, _ = waves()
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(segments[:2]).last_hidden_state
    found = build_encoder("wavlm", folder).encode(segments[:2]).features
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_published_files_have_older_names_a_head_and_may_lack_the_masking_vector(tmp_path) -> None:
    """facebook/wav2vec2-base-960h: weight_g and weight_v, wav2vec2.* under a CTC head, no masked_spec_embed."""
    from safetensors.torch import load_file, save_file

    folder = write(tmp_path / "new", "wav2vec2", "group", head=True)
    (tmp_path / "old").mkdir()
    for file in folder.iterdir():
        (tmp_path / "old" / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state = {key.replace(f"parametrizations.weight.{new}", old): tensor for key, tensor in state.items()}
    assert state.pop("wav2vec2.masked_spec_embed") is not None
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight_g" in state
    save_file(state, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    segments, lengths = waves()
    found, expected = (
        build_encoder("wav2vec2", tmp_path / which).encode(segments, lengths) for which in ("old", "new")
    )
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=1e-5)
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")  # most are published so
    (tmp_path / "old" / "model.safetensors").unlink()
    pickled = build_encoder("wav2vec2", tmp_path / "old").encode(segments, lengths)
    torch.testing.assert_close(pickled.features, expected.features, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["wavlm-layer", "hubert-group"])
def test_half_precision(written, kind: str) -> None:
    segments, lengths = waves()
    full, half = (
        build_encoder(kind.split("-")[0], written(kind), dtype=dtype).encode(segments[:3], lengths[:3])
        for dtype in ("float32", "bfloat16")
    )
    assert half.features.dtype == torch.bfloat16
    assert torch.equal(full.mask, half.mask)
    assert (half.features.float() - full.features).abs().mean() < 0.05 * full.features.abs().mean()


class _Code:
    def __reduce__(self):
        return (print, ("executed",))


def test_mistakes(written, tmp_path, capsys) -> None:
    with pytest.raises(EncoderError, match="is no hubert model: its model_type is wavlm, expected hubert"):
        build_encoder("hubert", written("wavlm-layer"))
    with pytest.raises(EncoderError, match="layer 3: this encoder has hidden states 0 to 2"):
        build_encoder("wavlm", written("wavlm-layer"), layer=3)
    with pytest.raises(EncoderError, match=r"expected float32 waveforms \(F,S\), found torch.float64"):
        build_encoder("hubert", written("hubert-group")).encode(torch.zeros(1, 500).double(), torch.tensor([500]))
    for file in written("wavlm-layer").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    extractor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor | {"sampling_rate": 8000}))
    with pytest.raises(EncoderError, match="reads sound at 8000 Hz; mokamm's is at 16000 Hz"):
        build_encoder("wavlm", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"encoder.layer_norm.weight": _Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"wavlm weights at .* were refused: the file holds Python objects"):
        build_encoder("wavlm", tmp_path)
    assert "executed" not in capsys.readouterr().out
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(EncoderError, match="wavlm weights could not be read"):
        build_encoder("wavlm", tmp_path)


@pytest.mark.parametrize("name", ["wav2vec2", "wavlm"])
def test_an_adapter_behind_the_blocks_is_left_out(tmp_path, name: str) -> None:
    """It would make 6 positions of 24; the blocks' own output is what the same weights give without it."""
    write(tmp_path / "with", name, "layer", add_adapter=True, num_adapter_layers=2)
    encoder = build_encoder(name, tmp_path / "with")
    segments, lengths = torch.randn(2, 8000) * 0.1, torch.tensor([8000, 5000])
    features, mask = encoder.encode(segments, lengths)
    assert mask.sum(1).tolist() == [encoder.num_tokens(8000), encoder.num_tokens(5000)]
    config = json.loads((tmp_path / "with" / "config.json").read_text())
    (tmp_path / "with" / "config.json").write_text(json.dumps(config | {"add_adapter": False}))
    assert torch.equal(build_encoder(name, tmp_path / "with").encode(segments, lengths).features, features)
