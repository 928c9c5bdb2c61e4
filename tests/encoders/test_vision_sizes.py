"""DINOv2 and DINOv3 with their registers, and frames of another size than the checkpoint's, against transformers and
open_clip called plainly on tiny random checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from encoders import EncoderError, build_encoder
from encoders.vision import ClipEncoder, Dinov2Encoder, Dinov3Encoder, SiglipEncoder
from encoders.vision_open_clip import OpenClipEncoder

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
DINO = {"dinov2": (1, Dinov2Encoder), "dinov2_with_registers": (1 + 3, Dinov2Encoder), "dinov3_vit": (5, Dinov3Encoder)}


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    small = torch.randint(0, 256, (5, 3, 12, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, scale_factor=5)  # 60 x 80 pixels


def randomise(model) -> None:
    """Every parameter random: an unused class token, a zero register or layer scale would hide a mistake."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.02, std=0.2)


def write(folder, kind: str):
    """A checkpoint of that model_type for 32 x 32 pixels, and its image processor."""
    import transformers as t

    big = {**TOWER, "image_size": 32}
    crop = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    square = {"size": {"height": 32, "width": 32}}
    model, processor = {
        "clip": lambda: (t.CLIPVisionModel(t.CLIPVisionConfig(**big)), t.CLIPImageProcessor(**crop)),
        "siglip": lambda: (t.SiglipVisionModel(t.SiglipVisionConfig(**big)), t.SiglipImageProcessor(**square)),
        "dinov2": lambda: (t.Dinov2Model(t.Dinov2Config(mlp_ratio=2, **big)), t.BitImageProcessor(**crop)),
        "dinov2_with_registers": lambda: (
            t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **big)),
            t.BitImageProcessor(**crop),
        ),
        "dinov3_vit": lambda: (
            t.DINOv3ViTModel(t.DINOv3ViTConfig(num_register_tokens=4, **big)),
            t.DINOv3ViTImageProcessor(**square),
        ),
    }[kind]()
    randomise(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = write(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", sorted(DINO))
@pytest.mark.parametrize("layer", [-1, 1, [-2, 0, 3]])
def test_dino_equals_transformers(written, frames, kind: str, layer) -> None:
    from transformers import AutoImageProcessor, AutoModel

    prefix, encoder_class = DINO[kind]
    folder = written(kind)
    pixels = AutoImageProcessor.from_pretrained(folder)(images=list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder).eval()(pixel_values=pixels, output_hidden_states=True)
    expected = torch.cat([output.hidden_states[i] for i in ([layer] if isinstance(layer, int) else layer)], dim=-1)
    encoder = encoder_class(folder, layer=layer, max_batch=2)
    features, mask = encoder.encode(frames)
    torch.testing.assert_close(features, expected[:, prefix:], rtol=0, atol=2e-5)
    assert (encoder.num_tokens(None), encoder.width) == (16, expected.shape[-1])
    assert mask.shape == (5, 16)
    assert mask.all()
    blocks = [m for m in encoder.model.modules() if type(m).__name__.endswith("Layer") and hasattr(m, "mlp")]
    assert len(blocks) == (2 if layer == 1 else 3)
    cls = encoder_class(folder, layer=layer, features="cls")
    torch.testing.assert_close(cls.encode(frames).features, expected[:, :1], rtol=0, atol=2e-5)
    if layer == -1:  # the state is the one before the final norm
        norm = getattr(encoder.model, "layernorm", None) or encoder.model.norm
        torch.testing.assert_close(norm(expected), output.last_hidden_state, rtol=0, atol=2e-5)


SIZES = {"clip": ClipEncoder, "siglip": SiglipEncoder, **{kind: found for kind, (_, found) in DINO.items()}}


@pytest.mark.parametrize("kind", sorted(SIZES))
@pytest.mark.parametrize("size", [48, 24])
def test_another_image_size(written, frames, kind: str, size: int) -> None:
    """The network called plainly on pixels of that size, which the processor makes in the checkpoint's proportions."""
    from transformers import AutoImageProcessor, AutoModel

    folder = written(kind)
    square = {"height": size, "width": size}
    crop = kind in ("clip", "dinov2", "dinov2_with_registers")
    sizes = {"size": {"shortest_edge": size * 40 // 32}, "crop_size": square} if crop else {"size": square}
    pixels = AutoImageProcessor.from_pretrained(folder)(images=list(frames), return_tensors="pt", **sizes)
    options = {"interpolate_pos_encoding": True} if kind in ("clip", "siglip") else {}
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder).eval()
        expected = model(**pixels, output_hidden_states=True, **options).hidden_states[-2]
    encoder = SIZES[kind](folder, image_size=size)
    count = (size // 8) ** 2
    assert encoder.num_tokens(None) == count
    torch.testing.assert_close(encoder.encode(frames).features, expected[:, -count:], rtol=0, atol=2e-5)
    assert encoder.fingerprint() != SIZES[kind](folder).fingerprint()
    same = SIZES[kind](folder, image_size=32)
    assert torch.equal(same.encode(frames).features, SIZES[kind](folder).encode(frames).features)


@pytest.fixture(scope="module", params=["own", "timm"])
def open_clip_folder(request, tmp_path_factory):
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
    if request.param == "timm":
        vision = {"timm_model_name": "test_vit", "image_size": 64, "timm_pool": "token"}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path_factory.mktemp("open_clip")
    build = open_clip.CustomTextCLIP if request.param == "timm" else open_clip.CLIP
    model = build(**cfg)
    randomise(model.visual)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    cfg["custom_text"] = request.param == "timm"
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
    return folder


def test_open_clip_at_another_size(open_clip_folder) -> None:
    import open_clip

    model = open_clip.create_model(f"local-dir:{open_clip_folder}", force_image_size=96).eval()
    plain = OpenClipEncoder(open_clip_folder)
    encoder = OpenClipEncoder(open_clip_folder, image_size=96, layer=[-1, 1])
    frames = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    pixels = (frames.float() / 255 - 0.5) / 0.25
    seen: dict[int, torch.Tensor] = {}
    blocks = model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *call, i=i: seen.__setitem__(i, call[2]))
    with torch.no_grad():
        model.encode_image(pixels)
    expected = torch.cat([seen[len(blocks) - 1], seen[0]], dim=-1)[:, 1:]
    features = encoder.encode(frames).features
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    assert encoder.num_tokens(None) == expected.shape[1] > plain.num_tokens(None)
    with pytest.raises(EncoderError, match=r"image_size 100: expected a multiple of the patch size \d+"):
        OpenClipEncoder(open_clip_folder, image_size=100)


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_open_clip_at_another_size_of_half_precision_weights(open_clip_folder, tmp_path, file: str, dtype) -> None:
    """As those same weights held in float32: nothing is computed in the precision of the file."""
    from safetensors.torch import load_file, save_file

    half = {key: w.to(dtype) for key, w in load_file(open_clip_folder / "open_clip_model.safetensors").items()}
    folders = {"half": half, "full": {key: w.float() for key, w in half.items()}}
    for name, weights in folders.items():
        (tmp_path / name).mkdir()
        (save_file if file.endswith(".safetensors") else torch.save)(weights, tmp_path / name / file)
        (tmp_path / name / "open_clip_config.json").write_text((open_clip_folder / "open_clip_config.json").read_text())
    frames = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    found, expected = (OpenClipEncoder(tmp_path / name, image_size=96).encode(frames).features for name in folders)
    assert torch.equal(found, expected)


def test_open_clip_by_name_and_a_file_of_weights(tmp_path, capsys, monkeypatch) -> None:
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-of-a-test.json").write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = open_clip.CLIP(**cfg).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    frames = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    encoders = [
        build_encoder("open_clip", "tiny-of-a-test", pretrained=str(tmp_path / file), layer=[3, -3])
        for file in ("w.safetensors", "w.pt")
    ]
    assert encoders[0].fingerprint() == encoders[1].fingerprint()
    x = encoders[0].preprocess(frames, None)[0]
    with torch.no_grad():
        expected = model.visual.forward_intermediates(x, output_fmt="NLC")["image_intermediates"]
    found = encoders[1].encode(frames).features
    torch.testing.assert_close(found, torch.cat([expected[2], expected[0]], dim=-1), rtol=0, atol=1e-5)
    tag = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-of-a-test", {"tag": tag})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: str(tmp_path / "w.pt"))
    for image_size, side in ((None, 32), (64, 64)):
        encoder = build_encoder("open_clip", "tiny-of-a-test", pretrained="tag", image_size=image_size)
        assert encoder.preprocessing.items() >= {**tag, "size": (side, side)}.items()
    torch.save({"visual.proj": _Code()}, tmp_path / "evil.pt")
    with pytest.raises(EncoderError, match="open_clip weights could not be read from 'tiny-of-a-test'"):
        build_encoder("open_clip", "tiny-of-a-test", pretrained=str(tmp_path / "evil.pt"))
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(EncoderError, match="could not be read"):
        build_encoder("open_clip", "tiny-of-a-test", pretrained="laion9b")


class _Code:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("kind", ["dinov2_with_registers", "dinov3_vit", "siglip"])
def test_a_checkpoint_that_lacks_a_weight(written, tmp_path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    for file in written(kind).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = sorted(key for key in weights if "embeddings" in key)[0]
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    encoder = {"siglip": "siglip2", "dinov3_vit": "dinov3"}.get(kind, "dinov2")
    with pytest.raises(EncoderError, match=r"is not a whole .* checkpoint: 1 weights missing .*embeddings"):
        build_encoder(encoder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="weights could not be read from"):
        build_encoder(encoder, tmp_path)


def test_mistakes(written, tmp_path) -> None:
    with pytest.raises(EncoderError, match="image_size 30: expected a multiple of the patch size 8; the nearest is 32"):
        build_encoder("dinov2", written("dinov2"), image_size=30)
    with pytest.raises(
        EncoderError, match="is no dinov2 model: its model_type is dinov3_vit, expected dinov2 or dinov2_"
    ):
        build_encoder("dinov2", written("dinov3_vit"))
    with pytest.raises(EncoderError, match=r"layer 4: this encoder has hidden states 0 to 3, or -1 to -4"):
        build_encoder("dinov3", written("dinov3_vit"), layer=[1, 4])
    for name, kind, hint in (("siglip2", "siglip2", "NaFlex"), ("dinov3", "dinov3_convnext", "ConvNeXt")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(EncoderError, match=f"its model_type is {kind}, expected .*{hint}"):
            build_encoder(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "[]"), ("config.json", {"hidden_size": "32"}), ("preprocessor_config.json", "[]")],
)
def test_json_of_another_form(written, tmp_path, file: str, content) -> None:
    shutil.copytree(written("dinov2"), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / file
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(EncoderError, match=r"^dinov2 \S+ could not be read from '.*'"):
        build_encoder("dinov2", tmp_path / "checkpoint")


def test_half_precision(written, frames) -> None:
    """Fixed-resolution SigLIP 2 checkpoints are of model_type siglip; here also in bfloat16."""
    full, half = (build_encoder("siglip2", written("siglip"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    found = half.encode(frames).features
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), full.encode(frames).features, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_frames_of_several_sizes_share_a_call(written, frames, kind: str, monkeypatch) -> None:
    encoder = build_encoder(kind, written(kind), max_batch=6)
    wide = F.interpolate(frames, size=(48, 96))
    lots = [frames[:3], frames[:1, :, :40, :40], wide[:1], wide[1:]]  # 3 + 1 + 1 + 4
    alone = [encoder.encode(lot) for lot in lots]
    calls: list[int] = []
    plain = type(encoder).forward
    monkeypatch.setattr(
        type(encoder), "forward", lambda self, *inputs: calls.append(len(inputs[0])) or plain(self, *inputs)
    )
    together = encoder.encode_frames(lots)
    assert calls == [5, 4]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-5)
        assert torch.equal(one.mask, other.mask)
    assert encoder.encode_frames([]) == []
