"""Vision towers against the libraries called directly, on tiny random models written to a temporary folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from encoders.base import EncoderError
from encoders.vision import ClipEncoder, SiglipEncoder
from encoders.vision_open_clip import OpenClipEncoder, open_clip_transform

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
TEXT = {
    **TOWER,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (5, 3, 12, 16), dtype=torch.uint8, generator=generator)
    return torch.nn.functional.interpolate(small, scale_factor=5)  # 60 x 80 pixels


def _pictures(frames: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy())) for frame in frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    return _write_open_clip(
        tmp_path_factory.mktemp("open_clip"),
        {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    )


def _write_open_clip(folder, vision_cfg):
    import open_clip
    from safetensors.torch import save_file

    text_cfg = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**cfg).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
    return folder


@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_clip_equals_transformers(clip, frames, layer: int) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    tower = CLIPModel.from_pretrained(clip).eval().vision_model
    pixels = CLIPImageProcessor.from_pretrained(clip)(images=_pictures(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    encoder = ClipEncoder(clip, layer=layer, max_batch=2)
    features, mask = encoder.encode(frames)
    torch.testing.assert_close(features, expected[:, 1:], rtol=0, atol=1e-5)
    assert mask.shape == (5, 16)
    assert mask.all()
    assert (encoder.num_tokens(None), encoder.width) == (16, 32)
    cls = ClipEncoder(clip, layer=layer, features="cls")
    torch.testing.assert_close(cls.encode(frames).features, expected[:, :1], rtol=0, atol=1e-5)
    assert cls.num_tokens(None) == 1
    assert cls.fingerprint() != encoder.fingerprint() == ClipEncoder(clip, layer=layer).fingerprint()


def test_siglip_equals_transformers(siglip, frames) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionModel

    tower = SiglipVisionModel.from_pretrained(siglip).eval()
    pixels = SiglipImageProcessor.from_pretrained(siglip)(images=_pictures(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
    encoder = SiglipEncoder(siglip)
    torch.testing.assert_close(encoder.encode(frames).features, hidden[-2], rtol=0, atol=1e-5)
    assert encoder.num_tokens(None) == 16
    with pytest.raises(EncoderError, match="no class token"):
        SiglipEncoder(siglip, features="cls")


@pytest.mark.parametrize(("layer", "block"), [(-2, 1), (-1, 2), (1, 0)])
def test_open_clip_equals_open_clip(open_clip_folder, frames, layer: int, block: int) -> None:
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{open_clip_folder}")
    seen = []
    model.eval().visual.transformer.resblocks[block].register_forward_hook(lambda *call: seen.append(call[2]))
    frames = frames[:, :, :32, :32].contiguous()  # the model's own size: preprocessing is exact
    with torch.no_grad():
        model.encode_image(torch.stack([transform(picture) for picture in _pictures(frames)]))
    encoder = OpenClipEncoder(open_clip_folder, layer=layer)
    torch.testing.assert_close(encoder.encode(frames).features, seen[0][:, 1:], rtol=0, atol=1e-5)
    cls = OpenClipEncoder(open_clip_folder, layer=layer, features="cls")
    torch.testing.assert_close(cls.encode(frames).features, seen[0][:, :1], rtol=0, atol=1e-5)
    assert (encoder.num_tokens(None), encoder.width) == (16, 32)


def test_open_clip_with_a_timm_tower(tmp_path, frames) -> None:
    folder = _write_open_clip(tmp_path, {"timm_model_name": "test_vit", "image_size": 64, "timm_pool": "token"})
    encoder = OpenClipEncoder(folder, layer=-1)
    blocks = encoder.visual.trunk.blocks
    seen = []
    blocks[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    features = encoder.encode(frames).features
    torch.testing.assert_close(features, seen[-1][:, 1:], rtol=0, atol=0)
    assert encoder.num_tokens(None) == features.shape[1]


@pytest.mark.parametrize(
    ("vision", "stages"),
    [
        ({"timm_model_name": "test_convnext", "timm_pool": "avg"}, {-1: "trunk.stages.3", -2: "trunk.stages.2"}),
        ({"layers": [1, 1, 1, 1], "width": 16}, {-1: "layer4", -2: "layer3"}),
    ],
    ids=["convnext", "resnet"],
)
def test_open_clip_with_a_tower_of_stages(tmp_path, frames, vision, stages: dict[int, str]) -> None:
    folder = _write_open_clip(tmp_path, {**vision, "image_size": 64})
    for (layer, name), side in zip(stages.items(), (2, 4), strict=True):
        encoder = OpenClipEncoder(folder, layer=layer)
        seen = []
        encoder.visual.get_submodule(name).register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
        features, mask = encoder.encode(frames)
        expected = torch.stack([seen[0][:, :, y, x] for y in range(side) for x in range(side)], dim=1)
        torch.testing.assert_close(features, expected, rtol=0, atol=0)
        assert mask.all()
        with torch.device("meta"):
            assert OpenClipEncoder(folder, layer=layer).num_tokens(None) == side**2
    with pytest.raises(EncoderError, match=r"layer \[-1, -2\]: the stages .* differ in their grids"):
        OpenClipEncoder(folder, layer=[-1, -2])
    with pytest.raises(EncoderError, match="no class token"):
        OpenClipEncoder(folder, features="cls")


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [32, (24, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_batched_preprocessing_equals_open_clips_on_pictures(frames, mode: str, size, interpolation: str) -> None:
    from open_clip.transform import image_transform

    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    transform = image_transform(size, False, mean, std, resize_mode=mode, interpolation=interpolation, fill_color=7)
    cfg = {"size": size, "mean": mean, "std": std, "resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
    expected = torch.stack([transform(picture) for picture in _pictures(frames)])
    found = open_clip_transform(frames, cfg)
    assert found.shape == expected.shape
    # Pillow and torchvision round a resized pixel differently: at most two of 255 levels, seldom more than none
    levels = (found - expected).abs() * torch.tensor(std)[:, None, None] * 255
    assert levels.max() < 2.01
    assert levels.mean() < 0.1


def test_frozen_typed_and_empty(open_clip_folder, frames) -> None:
    encoder = OpenClipEncoder(open_clip_folder, dtype="bfloat16")
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.encode(frames).features.dtype == torch.bfloat16
    assert encoder.encode(frames[:0]).features.shape == (0, 0, 32)
    with pytest.raises(EncoderError, match=r"expected uint8 frames \(F,3,H,W\), found torch.float32"):
        encoder.encode(frames.float())


def test_errors(clip, siglip, open_clip_folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(EncoderError, match="model_type is siglip_vision_model, expected clip or"):
        ClipEncoder(siglip)
    with pytest.raises(EncoderError, match=r"config.json is missing: no folder at 'weights/x/y' \(looked at /"):
        ClipEncoder("weights/x/y")
    with monkeypatch.context() as here:  # looks like a hub name, but its folder is here
        here.chdir(tmp_path.parent)
        with pytest.raises(EncoderError, match="no folder at"):
            ClipEncoder(f"{tmp_path.name}/clip")
    with pytest.raises(EncoderError, match="layer 7: this encoder has hidden states 0 to 3, or -1 to -4"):
        ClipEncoder(clip, layer=7)
    with pytest.raises(EncoderError, match="unknown features 'patches'; did you mean 'patch'"):
        ClipEncoder(clip, features="patches")
    with pytest.raises(EncoderError, match="unknown encoder dtype 'bf16'"):
        ClipEncoder(clip, dtype="bf16")
    with pytest.raises(EncoderError, match=r"no folder at 'weights/vit' \(looked at /"):
        OpenClipEncoder("weights/vit")
    with pytest.raises(EncoderError, match="unknown open_clip model 'ViT-L-15'; did you mean 'ViT-L-1"):
        OpenClipEncoder("ViT-L-15", pretrained="openai")
    with pytest.raises(EncoderError, match=r"has no open_clip_config\.json"):
        OpenClipEncoder(tmp_path)
    (tmp_path / "open_clip_config.json").write_text((open_clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(EncoderError, match="could not be read"):
        OpenClipEncoder(tmp_path)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"too short")
    with pytest.raises(EncoderError, match="could not be read"):
        OpenClipEncoder(tmp_path)


def test_checkpoint_without_its_weights(clip, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(clip / "model.safetensors")
    name = "vision_model.embeddings.class_embedding"
    save_file(
        {key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(EncoderError, match=r"not a whole clip checkpoint: 1 weights missing .*class_embedding"):
        ClipEncoder(tmp_path)
    save_file({**weights, name: torch.zeros(7)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match="clip"):
        ClipEncoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(EncoderError, match="clip weights could not be read"):
        ClipEncoder(tmp_path)
    save_file(weights | {name: weights[name][1:].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        EncoderError, match=r"1 weights of another shape .*class_embedding: \(\d+,\) instead of \(\d+,\)"
    ):
        ClipEncoder(tmp_path)
