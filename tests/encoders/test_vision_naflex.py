"""SigLIP 2 NaFlex against transformers' own model and image processor: wide, tall, tiny and large pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from encoders import EncoderError, build_encoder
from encoders.vision_naflex import NaflexEncoder
from mokamm.projectors import build_projector

SHAPES = [(40, 40), (24, 96), (96, 24), (8, 200), (5, 3), (120, 121)]  # pixels, height and width
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8,
    "num_patches": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 8, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As published: both towers in one checkpoint."""
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    folder = tmp_path_factory.mktemp("naflex")
    torch.manual_seed(0)
    model = Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=VISION))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.01, std=0.2)
    model.save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=20).save_pretrained(folder)
    return folder


def frames_of(shape: tuple[int, int], number: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 256, (number, 3, *shape), dtype=torch.uint8, generator=generator)


def expected(folder, pictures, layer: int = -2, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures in one call of the library, padded to the most patches."""
    from transformers import Siglip2ImageProcessor, Siglip2VisionModel

    model = Siglip2VisionModel.from_pretrained(folder).eval()
    inputs = Siglip2ImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt", **options)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return states[layer], inputs["pixel_attention_mask"].bool()


@pytest.mark.parametrize(("layer", "most"), [(-2, None), (1, None), (-2, 50)])
def test_features_and_counts_are_the_library_s(folder, layer, most) -> None:
    options = {} if most is None else {"max_num_patches": most}
    frames = [frames_of(shape) for shape in SHAPES]
    pictures = [Image.fromarray(np.ascontiguousarray(f.permute(1, 2, 0).numpy())) for part in frames for f in part]
    states, mask = expected(folder, pictures, layer, **options)
    encoder = build_encoder("siglip2_naflex", folder, layer=layer, max_patches=most)
    counts = set()
    for k, part in enumerate(frames):
        features, valid = encoder.encode(part)
        count = int(mask[2 * k].sum())
        counts.add(count)
        assert encoder.num_tokens(SHAPES[k]) == count == features.shape[1] == int(valid.sum(1)[0])
        assert valid.all()
        for row in range(2):
            torch.testing.assert_close(features[row], states[2 * k + row, :count], rtol=0, atol=2e-5)
    assert len(counts) > 2  # shapes of different numbers of patches
    assert max(counts) <= encoder.num_tokens() == (most or 20)


def test_a_wide_picture_is_not_a_tall_one(folder) -> None:
    encoder = NaflexEncoder(folder)
    assert (encoder.grid(24, 96), encoder.grid(96, 24)) == ((2, 8), (8, 2))
    wide = frames_of((24, 96), 1)
    tall = wide.transpose(2, 3).contiguous()
    assert not torch.allclose(encoder.encode(wide).features, encoder.encode(tall).features, atol=1e-2)


PROJECTORS = [
    ("qformer", {"tokens": 3, "hidden": 16, "heads": 2}),
    ("perceiver", {"tokens": 3, "hidden": 16, "heads": 2}),
    ("pooled", {"tokens": 18}),
    ("mlp", {"stride": 3}),
]


@pytest.mark.parametrize(("name", "options"), PROJECTORS)
def test_every_projector_heeds_the_mask_of_media_of_other_shapes(folder, name, options) -> None:
    """Side by side, padded as MultimodalLM pads them, each gives the tokens that it gives alone, in the told number."""
    encoder = NaflexEncoder(folder)
    torch.manual_seed(0)
    projector = build_projector(name, encoder.width, 24, **options).eval()
    alone = [encoder.encode(frames_of(shape, 1)) for shape in SHAPES]
    longest = max(one.mask.shape[1] for one in alone)
    pad = torch.nn.functional.pad
    features = torch.cat([pad(f, (0, 0, 0, longest - f.shape[1]), value=7.0) for f, _ in alone])
    mask = torch.cat([pad(m, (0, longest - m.shape[1])) for _, m in alone])
    with torch.no_grad():
        together = projector(features, mask)
        for k, one in enumerate(alone):
            count = projector.num_tokens(encoder.num_tokens(SHAPES[k]))
            found = projector(*one)
            assert found.shape[1] == count
            torch.testing.assert_close(together[k, :count], found[0], rtol=0, atol=1e-5)


def test_the_wrong_checkpoint_is_told_which_encoder_reads_it(folder, tmp_path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    fixed = {key: value for key, value in VISION.items() if key != "num_patches"}
    SiglipVisionModel(SiglipVisionConfig(**fixed, image_size=32)).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="its resolution is fixed: encoder `siglip2` reads it"):
        build_encoder("siglip2_naflex", tmp_path)
    with pytest.raises(EncoderError, match="a NaFlex checkpoint, which encoder `siglip2_naflex` reads"):
        build_encoder("siglip2", folder)
    with pytest.raises(EncoderError, match="max_patches"):
        build_encoder("siglip2_naflex", folder, max_patches=0)
    assert NaflexEncoder(folder).fingerprint() != NaflexEncoder(folder, max_patches=30).fingerprint()


def test_samples_are_laid_out_by_each_picture_s_shape(folder, media_like, tmp_path) -> None:
    """Through config, processor, cache and model: pictures of two shapes in one batch, first encoded, then cached."""
    from data.collate import collate
    from data.schema import Media, Message, Sample, Text
    from mokamm.build import build_model
    from mokamm.config import RunConfig

    encoder = {"name": "siglip2_naflex", "path": str(folder)}
    vision = {"encoder": encoder, "projector": {"name": "mlp", "stride": 2}, "segments": 2}
    base = {"path": "mokamm/mini/llm"}
    config = RunConfig.model_validate(
        {
            "model": {"llm": base, "modalities": {"vision": vision}},
            "data": {
                "media_dir": str(media_like),
                "train": [{"source": "messages", "path": "x.jsonl"}],
                "cache": {"dir": str(tmp_path / "cache"), "max_gb": 1},
            },
            "training": {"output_dir": "x", "stage": 1},
        }
    )
    model = build_model(config, "cpu", for_training=True)
    question = Text("what is this ?", question=True)
    samples = [
        Sample(
            name, (Message("user", (Media("image", name, "vision"), question)), Message("assistant", (Text("two"),)))
        )
        for name in ("wide.png", "near.png")
    ]
    losses = []
    for cached in (False, True):
        examples = [model.processor(sample) for sample in samples]
        items = [item for example in examples for item in example.media]
        assert [item.counts for item in items] == [[8], [10]]  # 2 x 8 and 4 x 5 patches, two to a token
        assert [item.segments is None for item in items] == [cached, cached]
        losses.append(model(collate(examples, model.processor.pad_id))["loss_sum"])
    assert torch.equal(*losses)
    alone = [model(collate([model.processor(one)], model.processor.pad_id))["loss_sum"] for one in samples]
    torch.testing.assert_close(losses[0], sum(alone), rtol=1e-4, atol=1e-3)
    assert model.processor.senses["vision"].most_tokens("image") == 10


@pytest.fixture(scope="module")
def media_like(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, shape in (("wide", (24, 96)), ("near", (120, 121))):
        Image.fromarray(frames_of(shape, 1)[0].permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return folder
