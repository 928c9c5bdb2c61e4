"""Under `torch.device("meta")` an encoder is built from its configuration alone: the same widths, numbers of tokens and
errors of its options, although the file that holds the weights is not even there. CLAP reads its audio tower alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encoders import EncoderError, build_encoder

BASE = Path(__file__).resolve().parents[2] / "mokamm" / "mini"
SIZE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
VISION = {**SIZE, "intermediate_size": 24, "image_size": 32, "patch_size": 8}
TEXT = {**SIZE, "intermediate_size": 24, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LENGTHS = (1, 400, 5_000, 16_000, 20_479)


def write(folder: Path, model, processor) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def clap() -> tuple:
    import transformers as t

    audio = t.ClapAudioConfig(
        hidden_size=32, patch_embeds_hidden_size=8, depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], window_size=2,
        spec_size=64, num_mel_bins=16, patch_size=4, patch_stride=(4, 4), projection_dim=8,
    )  # fmt: skip
    config = t.ClapConfig(text_config={**TEXT, "projection_dim": 8}, audio_config=audio.to_dict(), projection_dim=8)
    return t.ClapModel(config), t.ClapFeatureExtractor(feature_size=16, max_length_s=2)


def whisper() -> tuple:
    import transformers as t

    config = t.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=16, num_mel_bins=80, vocab_size=11, max_source_positions=100,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return t.WhisperModel(config), t.WhisperFeatureExtractor(feature_size=80, chunk_length=2)


def made() -> dict[str, tuple]:
    """Model and processor of each encoder that transformers builds."""
    import transformers as t

    crop = {"height": 32, "width": 32}
    siglip2 = {k: v for k, v in VISION.items() if k != "image_size"}
    wavlm = t.WavLMConfig(
        **SIZE, intermediate_size=24, conv_dim=(8,) * 7, num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=2
    )
    ast = t.ASTConfig(**SIZE, intermediate_size=24, max_length=128)
    return {
        "clip": (
            t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
            t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=crop),
        ),
        "siglip": (t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)), t.SiglipImageProcessor(size=crop)),
        "siglip2_naflex": (
            t.Siglip2VisionModel(t.Siglip2VisionConfig(**siglip2, num_patches=16)),
            t.Siglip2ImageProcessor(patch_size=8, max_num_patches=20),
        ),
        "dinov2": (
            t.Dinov2Model(t.Dinov2Config(**SIZE, image_size=32, patch_size=8)),
            t.BitImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        ),
        "ast": (t.ASTModel(ast), t.ASTFeatureExtractor(max_length=128)),
        "clap": clap(),
        "whisper": whisper(),
        "wavlm": (t.WavLMModel(wavlm), t.Wav2Vec2FeatureExtractor()),
    }


OPTIONS: dict[str, list[dict]] = {
    "clip": [{}, {"features": "cls"}, {"image_size": 48, "layer": [-2, 1]}],
    "dinov2": [{}, {"image_size": 64}],
    "siglip2_naflex": [{}, {"max_patches": 9}],
    "ast": [{}, {"layer": [0, 1]}],
    "open_clip": [{}, {"layer": [-2, 1]}],
}
NAMES = ["clip", "siglip", "siglip2_naflex", "dinov2", "ast", "clap", "whisper", "wavlm", "open_clip", "beats"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    found = {name: write(folder / name, *parts) for name, parts in made().items()}
    return {**found, "open_clip": BASE / "vision", "beats": BASE / "audio.safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_is_that_of_the_whole_encoder(checkpoints, name, tmp_path) -> None:
    for options in OPTIONS.get(name, [{}]):
        options = {"dtype": "bfloat16", **options}
        whole = build_encoder(name, checkpoints[name], **options)
        with torch.device("meta"):
            shape = build_encoder(name, bare(checkpoints[name], tmp_path), **options)
        assert all(p.is_meta for p in shape.parameters())
        assert {n: (p.shape, p.dtype) for n, p in shape.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in whole.named_parameters()
        }
        assert (shape.width, shape.modality_kind, shape.window_samples, shape.max_samples) == (
            whole.width, whole.modality_kind, whole.window_samples, whole.max_samples,
        )  # fmt: skip
        extents = LENGTHS if whole.modality_kind == "waveform" else (None, (30, 90), (64, 64))
        assert [shape.num_tokens(extent) for extent in extents] == [whole.num_tokens(extent) for extent in extents]


def bare(checkpoint: Path, folder: Path) -> Path:
    """A copy without weights; of BEATs, whose file says its shape too, the file."""
    import shutil

    if checkpoint.is_file():
        return checkpoint
    shutil.copytree(checkpoint, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return folder / "bare"


def test_a_tag_of_open_clip_fetches_nothing(monkeypatch) -> None:
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: pytest.fail("weights were fetched"))
    with torch.device("meta"):
        encoder = build_encoder("open_clip", "ViT-B-32", pretrained="openai")
        assert (encoder.num_tokens(None), encoder.width) == (49, 768)
        with pytest.raises(EncoderError, match="'opnai' is no file, and no tag of 'ViT-B-32'; did you mean 'openai'"):
            build_encoder("open_clip", "ViT-B-32", pretrained="opnai")


def test_mistakes_are_still_found(checkpoints, tmp_path) -> None:
    with torch.device("meta"):
        for name, options, message in (
            ("clip", {"layer": 9}, "layer 9: this encoder has hidden states 0 to 2"),
            ("clip", {"image_size": 30}, "multiple of the patch size 8"),
            ("siglip", {"features": "cls"}, "no class token"),
            ("dinov2", {"layr": 1}, "did you mean 'layer'"),
        ):
            with pytest.raises(EncoderError, match=message):
                build_encoder(name, checkpoints[name], **options)
        with pytest.raises(EncoderError, match="is no dinov2 model: its model_type is whisper"):
            build_encoder("dinov2", checkpoints["whisper"])
        with pytest.raises(EncoderError, match="missing"):
            build_encoder("clip", tmp_path / "nowhere")


def test_clap_reads_its_audio_tower_alone(checkpoints, monkeypatch) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import ClapModel

    encoder = build_encoder("clap", checkpoints["clap"])
    tower = ClapModel.from_pretrained(checkpoints["clap"]).audio_model.state_dict()
    own = encoder.model.state_dict()
    assert own.keys() == tower.keys()
    assert all(torch.equal(own[key], tower[key]) for key in own)
    # a checkpoint whose text tower is gone is as good; one whose audio tower is not whole is refused
    file = checkpoints["clap"] / "model.safetensors"
    state = {key: tensor for key, tensor in load_file(file).items() if not key.startswith("text_")}
    save_file(state, file, metadata={"format": "pt"})
    assert build_encoder("clap", checkpoints["clap"]).fingerprint() == encoder.fingerprint()
    del state["audio_model.audio_encoder.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 weights missing \(audio_encoder.norm.weight\)"):
        build_encoder("clap", checkpoints["clap"])


@pytest.mark.parametrize("published", [False, True])
def test_whisper_reads_its_encoder_alone(tmp_path, published) -> None:
    """From a WhisperModel (keys `encoder.`) and from what is published, with its head (keys `model.encoder.`)."""
    import transformers as t
    from safetensors.torch import load_file, save_file

    bare, extractor = whisper()
    model = t.WhisperForConditionalGeneration(bare.config) if published else bare
    folder = write(tmp_path, model, extractor)
    encoder = build_encoder("whisper", folder)
    expected = (model.model if published else model).encoder.state_dict()
    own = encoder.model.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[key], expected[key]) for key in own)
    # without its decoder the checkpoint is as good; without a weight of the encoder it is refused
    file = folder / "model.safetensors"
    state = {key: tensor for key, tensor in load_file(file).items() if "encoder." in key}
    assert len(state) == len(own)
    save_file(state, file, metadata={"format": "pt"})
    assert build_encoder("whisper", folder).fingerprint() == encoder.fingerprint()
    del state[f"{'model.' * published}encoder.layer_norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 weights missing \(layer_norm.weight\)"):
        build_encoder("whisper", folder)
