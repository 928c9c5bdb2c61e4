"""Tiny checkpoints of true architectures through a whole model: config, layout, encoders, projectors, loss, gradients."""

from __future__ import annotations

import pytest
import torch

from data.collate import collate
from data.schema import Media, Message, Sample, Text, UserError
from mokamm.build import build_model, build_processor
from mokamm.config import ConfigError, RunConfig
from mokamm.outline import build_outline


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """DINOv2 with registers, AST and WavLM, as their authors' files are laid out."""
    import transformers as t

    folder, size = tmp_path_factory.mktemp("checkpoints"), {"num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    dino = t.Dinov2WithRegistersConfig(hidden_size=16, mlp_ratio=2, image_size=32, patch_size=8, **size)
    ast = t.ASTConfig(hidden_size=16, intermediate_size=24, max_length=128, **size)
    wavlm = t.WavLMConfig(
        hidden_size=16, intermediate_size=24, conv_dim=(8,) * 7, feat_extract_norm="layer", do_stable_layer_norm=True,
        num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=2, **size,
    )  # fmt: skip
    for name, model, processor in (
        ("dinov2", t.Dinov2WithRegistersModel(dino), t.BitImageProcessor(size={"shortest_edge": 32}, crop_size=32)),
        ("ast", t.ASTModel(ast), t.ASTFeatureExtractor(max_length=128)),
        ("wavlm", t.WavLMModel(wavlm), t.Wav2Vec2FeatureExtractor(return_attention_mask=True)),
    ):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.02, std=0.2)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def config_of(checkpoints, mini_base, media_dir, **speech) -> RunConfig:
    def encoder(name: str, **options) -> dict:
        return {"name": name, "path": str(checkpoints / name), **options}

    small = {"hidden": 24, "heads": 4, "layers": 1}
    modalities = {
        "vision": {
            "encoder": encoder("dinov2", layer=[-2, 1], image_size=48),
            "projector": {"name": "perceiver", "tokens": 3, **small},
            "segments": 2,
        },
        "audio": {"encoder": encoder("ast"), "projector": {"name": "pooled", "tokens": 4}, "segments": 2},
        "speech": {
            "encoder": encoder("wavlm", layer=[0, -1]),
            "projector": {"name": "mlp", "stride": 8},
            "segments": 3,
            "seconds": 1.0,
            **speech,
        },
    }
    return RunConfig.model_validate(
        {
            "model": {"llm": {"path": str(mini_base / "llm")}, "modalities": modalities},
            "data": {"media_dir": str(media_dir), "train": [{"source": "messages", "path": "x.jsonl"}]},
            "training": {"output_dir": "x", "stage": 1},
        }
    )


def sample(*media: Media, answer: str = "two") -> Sample:
    question = Message("user", (*media, Text("what is this ?", question=True)))
    return Sample(id="s", messages=(question, Message("assistant", (Text(answer),))))


def test_losses_are_those_of_each_sample_alone_and_every_parameter_of_a_projector_trains(
    checkpoints, mini_base, media_dir
) -> None:
    model = build_model(config_of(checkpoints, mini_base, media_dir), "cpu", for_training=True)
    assert model.processor.senses["audio"].seconds == pytest.approx(1.28)  # AST's own window
    video, picture = Media("video", "clip.mp4", "vision"), Media("image", "wide.png", "vision")
    sound, speech = Media("audio", "long.wav", "audio"), Media("audio", "long.wav", "speech")
    short = Media("audio", "short.wav", "speech")
    samples = [sample(video, speech), sample(sound, short, answer="one red square"), sample(picture)]
    examples = [model.processor(one) for one in samples]
    # 2.5 s of speech: windows of 1, 1 and 0.5 s, 49, 49 and 24 positions, eight of them a token
    assert [item.counts for item in examples[0].media] == [[3, 3], [7, 7, 3]]
    assert [item.counts for item in examples[1].media] == [[4, 4], [5]]
    batch = model(collate(examples, model.processor.pad_id))
    batch["loss_sum"].backward()
    for name, parameter in model.projectors.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert not any(p.requires_grad for encoder in model.perception.encoders.values() for p in encoder.parameters())
    alone = [model(collate([model.processor(one)], model.processor.pad_id))["loss_sum"] for one in samples]
    torch.testing.assert_close(batch["loss_sum"], sum(alone), rtol=1e-4, atol=1e-3)


def test_all_mistakes_of_all_parts_are_told_at_once(checkpoints, mini_base, media_dir) -> None:
    config = config_of(checkpoints, mini_base, media_dir, projector={"name": "mlp", "strid": 8})
    config.model.modalities["vision"].encoder.layr = 1
    for build in (build_processor, build_outline, lambda config: build_model(config, "cpu")):
        with pytest.raises(ConfigError) as error:
            build(config)
        assert "model.modalities.vision.encoder: encoder 'dinov2' has no option 'layr'; did you mean" in str(
            error.value
        )
        assert "model.modalities.speech.projector: projector 'mlp' has no option 'strid'" in str(error.value)


def test_mistakes_of_the_config(checkpoints, mini_base, media_dir) -> None:
    config = config_of(checkpoints, mini_base, media_dir, projector={"name": "pooled", "token": 3})
    with pytest.raises(UserError, match="projector 'pooled' has no option 'token'; did you mean 'tokens'"):
        build_model(config, "cpu")
