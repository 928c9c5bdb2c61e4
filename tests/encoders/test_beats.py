"""BEATs against a plain float64 re-implementation (loops and formulas), torchaudio's filter bank, T5's buckets."""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

from encoders.audio import BeatsEncoder
from encoders.base import EncoderError
from encoders.beats import BEATs, BeatsConfig, load_beats, relative_position_buckets, save_beats
from encoders.fbank import kaldi_fbank

SMALL = BeatsConfig(
    embed_dim=12,
    encoder_layers=2,
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=20,
    encoder_attention_heads=2,
    conv_pos=6,
    conv_pos_groups=4,
    num_buckets=32,
    max_distance=40,
    predictor_class=5,
)


@pytest.fixture
def model() -> BEATs:
    """Every parameter random, so that a forgotten bias or gate shows."""
    torch.manual_seed(0)
    model = BEATs(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.4)
    return model.eval()


# ---- the reference: numpy float64, written from the formulas ----


def _layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _bucket(distance, buckets, max_distance):
    side = buckets // 2
    exact = side // 2
    start = side if distance > 0 else 0
    distance = abs(distance)
    if distance < exact:
        return start + distance
    far = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (side - exact))
    return start + min(far, side - 1)


def _attention(x, weights, name, cfg):
    heads, dim = cfg.encoder_attention_heads, cfg.encoder_embed_dim // cfg.encoder_attention_heads
    q, k, v = (_linear(x, weights, f"{name}.{letter}_proj") for letter in "qkv")
    table = weights["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    out = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        for i in range(len(x)):
            eight = _linear(q[i, part], weights, f"{name}.grep_linear")
            a, b = _sigmoid(eight[:4].sum()), _sigmoid(eight[4:].sum())
            gate = a * (b * weights[f"{name}.grep_a"][0, head, 0, 0] - 1) + 2
            scores = np.array(
                [
                    q[i, part] @ k[j, part] / math.sqrt(dim)
                    + gate * table[_bucket(j - i, cfg.num_buckets, cfg.max_distance), head]
                    for j in range(len(x))
                ]
            )
            share = np.exp(scores - scores.max())
            out[i, part] = (share / share.sum()) @ v[:, part]
    return _linear(out, weights, f"{name}.out_proj")


def _positions(x, weights, cfg):
    """The convolution by torch's own (deprecated) weight norm, whose names the published checkpoints carry."""
    conv = torch.nn.Conv1d(x.shape[1], x.shape[1], cfg.conv_pos, padding=cfg.conv_pos // 2, groups=cfg.conv_pos_groups)
    conv = torch.nn.utils.weight_norm(conv, dim=2).double()
    for name in ("weight_g", "weight_v", "bias"):
        getattr(conv, name).data = torch.from_numpy(weights[f"encoder.pos_conv.0.{name}"])
    y = conv(torch.from_numpy(x).T[None])[0].T.detach().numpy()[:-1]  # even kernel: the last position is cut
    return _gelu(y)


def _reference(fbank, weights, cfg, layers=None):
    size, rows = cfg.input_patch_size, len(fbank) // cfg.input_patch_size
    kernel = weights["patch_embedding.weight"]
    patches = [
        np.array(
            [
                (kernel[e, 0] * fbank[r * size : (r + 1) * size, f * size : (f + 1) * size]).sum()
                for e in range(len(kernel))
            ]
        )
        for r in range(rows)
        for f in range(128 // size)
    ]
    x = _linear(_layer_norm(np.stack(patches), weights, "layer_norm"), weights, "post_extract_proj")
    x = _layer_norm(x + _positions(x, weights, cfg), weights, "encoder.layer_norm")
    alpha = (2 * cfg.encoder_layers) ** 0.25
    for index in range(cfg.encoder_layers if layers is None else layers):
        name = f"encoder.layers.{index}"
        x = _layer_norm(
            alpha * x + _attention(x, weights, f"{name}.self_attn", cfg), weights, f"{name}.self_attn_layer_norm"
        )
        inner = _linear(_gelu(_linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")
        x = _layer_norm(alpha * x + inner, weights, f"{name}.final_layer_norm")
    return x


def test_equals_the_plain_reference(model: BEATs) -> None:
    model = model.double()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    fbank = torch.randn(2, 98, 128, dtype=torch.float64)
    with torch.no_grad():
        x, mask = model.from_fbank(fbank)
        logits = model.logits(x, mask)
    assert x.shape == (2, 48, 16)
    assert mask.all()
    for i in range(2):
        expected = _reference(fbank[i].numpy(), weights, SMALL)
        np.testing.assert_allclose(x[i].numpy(), expected, rtol=0, atol=1e-10)
        by_patch = _linear(expected, weights, "predictor")
        np.testing.assert_allclose(logits[i].numpy(), by_patch.mean(0), rtol=0, atol=1e-10)


def test_padding_is_invisible_in_float64(model: BEATs) -> None:
    model = model.double()
    fbank = torch.randn(3, 100, 128, dtype=torch.float64)
    lengths = torch.tensor([16000, 2560 * 3, 2561])  # a frame or patch is masked only when all of it is padding
    with torch.no_grad():
        x, mask = model.from_fbank(fbank, lengths)
        assert mask.sum(1).tolist() == [48, 24, 16]
        for i, rows in enumerate((6, 3, 2)):
            alone, _ = model.from_fbank(fbank[i : i + 1, : rows * 16])
            torch.testing.assert_close(x[i, : rows * 8], alone[0], rtol=0, atol=1e-10)
            expected = model.logits(alone)[0]
            torch.testing.assert_close(model.logits(x, mask)[i], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("buckets", "distance", "length"), [(320, 800, 496), (32, 128, 300)])
def test_buckets_equal_t5(buckets: int, distance: int, length: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    position = torch.arange(length)
    expected = T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], bidirectional=True, num_buckets=buckets, max_distance=distance
    )
    assert torch.equal(relative_position_buckets(length, buckets, distance, torch.device("cpu")), expected)


def test_fbank_equals_torchaudio() -> None:
    from torchaudio.compliance import kaldi

    torch.manual_seed(0)
    waves = torch.randn(3, 16000) * torch.tensor([[0.3], [1e-4], [0.0]]) * 2**15
    waves[0, 8000:] = 0
    expected = [
        kaldi.fbank(wave[None], num_mel_bins=128, sample_frequency=16000, frame_length=25, frame_shift=10)
        for wave in waves
    ]
    found = kaldi_fbank(waves)
    assert found.shape == (3, 98, 128)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)


def _plain_fbank(wave: np.ndarray, window_power: float) -> np.ndarray:
    """Kaldi's filter bank in float64 by its definition, a frame and a triangle at a time."""

    def mel(hertz):
        return 1127.0 * math.log(1.0 + hertz / 700.0)

    low, high = mel(20.0), mel(8000.0)
    step = (high - low) / 129
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** window_power
    rows = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400] - wave[start : start + 400].mean()
        frame = np.concatenate([[frame[0] * (1 - 0.97)], frame[1:] - 0.97 * frame[:-1]]) * window
        power = np.abs(np.fft.fft(frame, 512)) ** 2
        row = []
        for m in range(128):
            left, centre, right = (low + (m + i) * step for i in range(3))
            energy = 0.0
            for k in range(256):  # Kaldi leaves the Nyquist bin out
                at = mel(k * 16000 / 512)
                energy += power[k] * max(0.0, min((at - left) / (centre - left), (right - at) / (right - centre)))
            row.append(math.log(max(energy, float(np.finfo(np.float32).eps))))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("window_power", [0.85, 1.0])
def test_fbank_equals_its_definition_in_float64(window_power: float) -> None:
    torch.manual_seed(0)
    wave = torch.randn(1, 1100) * 2**12
    found = kaldi_fbank(wave, window_power)[0].numpy()
    assert found.shape == (5, 128)
    np.testing.assert_allclose(found, _plain_fbank(wave[0].double().numpy(), window_power), rtol=0, atol=2e-3)


def test_the_waveform_is_scaled_and_the_filter_bank_normalised_as_published(model: BEATs) -> None:
    wave = torch.randn(1, 2800) * 0.1
    expected = (_plain_fbank(wave[0].double().numpy() * 2**15, 0.85) - 15.41663) / (2 * 6.55582)
    np.testing.assert_allclose(model.fbank(wave)[0].numpy(), expected, rtol=0, atol=2e-4)


def _published_patches(samples: int, valid: int) -> list[bool]:
    """Which patches the published forward_padding_mask keeps: the mask cut evenly over the frames, then over patches."""
    frames = 1 + (samples - 400) // 160
    patches = frames // 16 * 8
    mask = np.arange(samples) >= valid
    for count in (frames, patches):
        extra = len(mask) % count
        mask = (mask[:-extra] if extra else mask).reshape(count, -1).all(-1)
    return (~mask).tolist()


@pytest.mark.parametrize("samples", [16000, 32000, 160000])
def test_the_padding_mask_is_the_published_one_at_whole_rows(model: BEATs, samples: int) -> None:
    """Elsewhere that one splits the last row of patches over frequency, and here the row is valid."""
    rows = (1 + (samples - 400) // 160) // 16
    lengths = torch.tensor([2560 * row for row in range(1, rows + 1)] + [2560 * row + 1000 for row in range(rows)])
    fbank = torch.zeros(len(lengths), 1 + (samples - 400) // 160, 128)
    with torch.no_grad():
        model.encoder.layers = model.encoder.layers[:1]
        _, mask = model.from_fbank(fbank, lengths)
    for length, own in zip(lengths.tolist(), mask.tolist(), strict=True):
        published = _published_patches(samples, length)
        if length % 2560 == 0:
            assert own == published, length
        else:
            assert sum(published) < sum(own) == -(-sum(published) // 8) * 8, length
        assert own == sorted(own, reverse=True)


def test_published_names_and_shapes() -> None:
    """The fine-tuned AS2M checkpoint's keys, written out."""
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in BEATs(BeatsConfig()).state_dict().items()}
    norm = {"weight": (768,), "bias": (768,)}
    square = {"weight": (768, 768), "bias": (768,)}
    layer = {
        **{f"self_attn.{letter}_proj": square for letter in ("q", "k", "v", "out")},
        "self_attn.grep_linear": {"weight": (8, 64), "bias": (8,)},
        "self_attn.relative_attention_bias": {"weight": (320, 12)},
        "self_attn_layer_norm": norm,
        "fc1": {"weight": (3072, 768), "bias": (3072,)},
        "fc2": {"weight": (768, 3072), "bias": (768,)},
        "final_layer_norm": norm,
    }
    modules = {
        "patch_embedding": {"weight": (512, 1, 16, 16)},
        "layer_norm": {"weight": (512,), "bias": (512,)},
        "post_extract_proj": {"weight": (768, 512), "bias": (768,)},
        "encoder.pos_conv.0": {"weight_g": (1, 1, 128), "weight_v": (768, 48, 128), "bias": (768,)},
        "encoder.layer_norm": norm,
        "predictor": {"weight": (527, 768), "bias": (527,)},
    }
    modules |= {f"encoder.layers.{i}.{name}": shapes for i in range(12) for name, shapes in layer.items()}
    expected = {f"{module}.{name}": shape for module, shapes in modules.items() for name, shape in shapes.items()}
    expected |= {f"encoder.layers.{i}.self_attn.grep_a": (1, 12, 1, 1) for i in range(12)}
    assert found == expected


def test_trains_and_shares_one_bias_table(model: BEATs) -> None:
    x, mask = model.features(torch.randn(2, 16000), torch.tensor([16000, 6000]))
    model.logits(x, mask).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    tables = [layer.self_attn.relative_attention_bias for layer in model.encoder.layers]
    assert tables[0] is tables[1]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_round_trip(model: BEATs, tmp_path, suffix: str) -> None:
    save_beats(tmp_path / f"b{suffix}", model)
    again = load_beats(tmp_path / f"b{suffix}")
    assert asdict(again.cfg) == asdict(SMALL)
    wave = torch.randn(2, 16000)
    with torch.no_grad():
        assert torch.equal(again.eval().features(wave)[0], model.features(wave)[0])


def test_published_pt_with_unknown_cfg_fields(model: BEATs, tmp_path) -> None:
    torch.save({"cfg": {**asdict(SMALL), "label_rate": 7}, "model": model.state_dict()}, tmp_path / "b.pt")
    assert load_beats(tmp_path / "b.pt").cfg == SMALL


def test_keys_missing_from_a_cfg_are_the_published_codes(tmp_path) -> None:
    """The defaults of BEATsConfig in microsoft/unilm, beats/BEATs.py, written out."""
    published = {
        "embed_dim": 512, "conv_bias": False, "encoder_layers": 12, "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12, "activation_fn": "gelu",
        "layer_wise_gradient_decay_ratio": 1.0, "layer_norm_first": False, "deep_norm": False, "dropout": 0.1,
        "attention_dropout": 0.1, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "dropout_input": 0.0,
        "conv_pos": 128, "conv_pos_groups": 16, "relative_position_embedding": False, "num_buckets": 320,
        "max_distance": 1280, "gru_rel_pos": False, "finetuned_model": False, "predictor_dropout": 0.1,
        "predictor_class": 527,
    }  # fmt: skip
    assert asdict(BeatsConfig.from_dict({"input_patch_size": 16})) == {"input_patch_size": 16, **published}
    for cfg in ({}, {"input_patch_size": -1}):
        with pytest.raises(EncoderError, match="cfg has no input_patch_size"):
            BeatsConfig.from_dict(cfg)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("encoder_embed_dim", "768", "should be a valid integer"),
        ("encoder_layers", None, "should be a valid integer"),
        ("encoder_layers", True, "should be a valid integer"),
        ("embed_dim", -512, "should be greater than or equal to 1"),
        ("encoder_attention_heads", 0, "should be greater than or equal to 1"),
        ("input_patch_size", "16", "should be a valid integer"),
        ("input_patch_size", 0, "should be greater than or equal to 1"),
        ("input_patch_size", 129, "should be less than or equal to 128"),
        ("num_buckets", 3, "should be greater than or equal to 4"),
        ("dropout", 1.5, "should be less than or equal to 1"),
        ("deep_norm", 1, "should be a valid boolean"),
        ("activation_fn", ["gelu"], "should be a valid string"),
    ],
)
def test_a_value_of_a_wrong_type_or_range_is_named(model: BEATs, tmp_path, field: str, value, expected: str) -> None:
    torch.save({"cfg": {**asdict(SMALL), field: value}, "model": model.state_dict()}, tmp_path / "b.pt")
    with pytest.raises(
        EncoderError, match=re.escape(f"cfg cannot be read: option '{field}' {expected}; found {value!r}")
    ):
        load_beats(tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder_attention_heads": 3},
            "encoder_embed_dim is a multiple of its encoder_attention_heads; found 16 and 3",
        ),
        ({"conv_pos_groups": 5}, "encoder_embed_dim is a multiple of its conv_pos_groups; found 16 and 5"),
        ({"max_distance": 8}, "max_distance is above a quarter of its num_buckets; found 8 and 32"),
    ],
)
def test_values_that_do_not_go_together_are_named(changes, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        BeatsConfig.from_dict({**asdict(SMALL), **changes})


@pytest.mark.parametrize("cfg", ["{", "null", "[16]"])
def test_a_cfg_that_is_no_json_object(tmp_path, cfg: str) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"cfg": cfg})
    with pytest.raises(EncoderError, match="expected a JSON object under the metadata key 'cfg'"):
        load_beats(tmp_path / "b.safetensors")


def test_a_predictor_is_there_where_the_file_has_one(model: BEATs, tmp_path) -> None:
    cfg, state = asdict(SMALL), model.state_dict()
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("predictor")}
    for said in ({"finetuned_model": True}, {"finetuned_model": False}, {}):
        cfg = {key: value for key, value in cfg.items() if key != "finetuned_model"} | said
        torch.save({"cfg": cfg, "model": state}, tmp_path / "tuned.pt")
        torch.save({"cfg": cfg, "model": bare}, tmp_path / "bare.pt")
        assert torch.equal(load_beats(tmp_path / "tuned.pt").predictor.weight, state["predictor.weight"])
        pretrained = load_beats(tmp_path / "bare.pt")
        assert pretrained.predictor is None
        assert not pretrained.cfg.finetuned_model
        with pytest.raises(EncoderError, match="has no predictor"):
            pretrained.logits(torch.zeros(1, 8, 16))


def test_encoder_does_not_depend_on_the_batch(model: BEATs, tmp_path) -> None:
    save_beats(tmp_path / "b.safetensors", model)
    encoder = BeatsEncoder(tmp_path / "b.safetensors", max_batch=3)
    assert encoder.width == 16
    lengths = torch.tensor([16000, 15999, 9000, 5360, 2800, 399, 1])
    waves = torch.randn(7, 16000) * 0.1  # what lies past a length must not matter
    features, mask = encoder.encode(waves, lengths)
    assert features.shape == (7, 48, 16)
    assert not features.requires_grad
    for i, length in enumerate(lengths.tolist()):
        alone = encoder.encode(waves[i : i + 1, :length])
        count = encoder.num_tokens(length)
        assert mask[i].sum() == count == alone.mask.sum()
        assert mask[i, :count].all()
        assert (features[i, count:] == 0).all()
        torch.testing.assert_close(features[i, :count], alone.features[0], rtol=0, atol=1e-5)
    assert [encoder.num_tokens(n) for n in (16000, 32000, 5360, 5359, 1)] == [48, 96, 16, 8, 8]


def test_layers_of_the_encoder_are_the_states_of_the_plain_reference(model: BEATs, tmp_path) -> None:
    save_beats(tmp_path / "b.safetensors", model)
    wave = torch.randn(1, 5360) * 0.1
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    fbank = model.fbank(wave)[0].double().numpy()
    encoder = BeatsEncoder(tmp_path / "b.safetensors", layer=[1, -1, 0])
    features = encoder.encode(wave).features[0]
    assert features.shape == (16, 48)
    assert encoder.width == 48
    for part, layers in enumerate((1, 2, 0)):
        expected = _reference(fbank, weights, SMALL, layers)
        found = features[:, 16 * part : 16 * part + 16]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)
    with pytest.raises(EncoderError, match="layer 3: this encoder has hidden states 0 to 2"):
        BeatsEncoder(tmp_path / "b.safetensors", layer=3)


def test_whole_segments_equal_the_published_forward(model: BEATs, tmp_path) -> None:
    save_beats(tmp_path / "b.safetensors", model)
    waves = torch.randn(2, 16000) * 0.1
    with torch.no_grad():
        expected = model.features(waves)[0]
    found = BeatsEncoder(tmp_path / "b.safetensors").encode(waves)
    torch.testing.assert_close(found.features, expected, rtol=0, atol=1e-5)


# ---- bad files ----


class _Code:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_pt_is_refused(tmp_path, capsys) -> None:
    with open(tmp_path / "evil.pt", "wb") as file:
        pickle.dump({"cfg": {}, "model": _Code()}, file, protocol=2)
    torch.save({"cfg": {}, "model": _Code()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(EncoderError, match="refused: it holds Python objects"):
            load_beats(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_wrong_architecture_names_the_keys(model: BEATs, tmp_path) -> None:
    state = model.state_dict()
    del state["encoder.layer_norm.bias"]
    state["head.weight"] = torch.zeros(1)
    state["layer_norm.bias"] = torch.zeros(3)
    torch.save({"cfg": asdict(SMALL), "model": state}, tmp_path / "b.pt")
    with pytest.raises(EncoderError) as error:
        load_beats(tmp_path / "b.pt")
    for part in ("missing (encoder.layer_norm.bias)", "unexpected (head.weight)", "(3,) instead of (12,)"):
        assert part in str(error.value)


def test_missing_truncated_and_foreign_files(model: BEATs, tmp_path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(EncoderError, match=r"nothing at 'nowhere.safetensors' \(looked at /"):
        load_beats("nowhere.safetensors")
    with pytest.raises(EncoderError, match=r"is a folder; expected BEATs' \.pt, or the \.safetensors"):
        load_beats(tmp_path)
    save_beats(tmp_path / "b.safetensors", model)
    content = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(EncoderError, match="not a whole safetensors file"):
        load_beats(tmp_path / "short.safetensors")
    for content in (b"PK\x03\x04 not much", b"", b"hello", b"<html>404</html>"):
        (tmp_path / "short.pt").write_bytes(content)
        with pytest.raises(EncoderError, match=r"short\.pt"):
            load_beats(tmp_path / "short.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(EncoderError, match="no metadata key 'cfg'"):
        load_beats(tmp_path / "foreign.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(EncoderError, match="expected the keys cfg and model, found state_dict"):
        load_beats(tmp_path / "foreign.pt")


def test_cfg_is_json_in_the_metadata(model: BEATs, tmp_path) -> None:
    from safetensors import safe_open

    save_beats(tmp_path / "b.safetensors", model)
    with safe_open(str(tmp_path / "b.safetensors"), framework="pt") as opened:
        assert json.loads(opened.metadata()["cfg"]) == asdict(SMALL)
