"""Projectors against plain formulas: shapes, masks, independence of segments, and no idle parameter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from data.schema import UserError
from mokamm.projectors import PROJECTORS, build_projector

OPTIONS = {"qformer": {"tokens": 5, "hidden": 24, "heads": 4, "layers": 2}, "mlp": {"stride": 3, "hidden": 20}}


def make(name: str, **options):
    torch.manual_seed(0)
    return build_projector(name, 10, 16, **{**OPTIONS[name], **options}).double()


def ragged(patches=(7, 4, 1), width=10):
    torch.manual_seed(1)
    features = torch.randn(len(patches), max(patches), width, dtype=torch.float64)
    return features, torch.arange(max(patches)) < torch.tensor(patches)[:, None]


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_each_segment_is_projected_alone_and_padding_does_not_matter(name):
    projector = make(name)
    features, mask = ragged()
    tokens = projector(features, mask)
    assert tokens.shape == (3, projector.num_tokens(7), 16)
    garbage = torch.where(mask[..., None], features, 99.0)
    for i, patches in enumerate(mask.sum(1).tolist()):
        count = projector.num_tokens(patches)
        alone = projector(features[i : i + 1, :patches], mask[i : i + 1, :patches])[0]
        assert alone.shape == (count, 16)
        torch.testing.assert_close(tokens[i, :count], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(projector(garbage, mask)[i, :count], alone, rtol=0, atol=1e-12)


def test_mlp_is_its_formula():
    projector = make("mlp")
    features, mask = ragged((7,))
    normed = F.layer_norm(features[0], (10,), projector.norm.weight, projector.norm.bias)
    padded = torch.cat([normed, normed.new_zeros(2, 10)])
    first, _, last = projector.output
    for k in range(3):
        group = torch.cat([padded[3 * k], padded[3 * k + 1], padded[3 * k + 2]])
        expected = last.weight @ F.gelu(first.weight @ group + first.bias) + last.bias
        torch.testing.assert_close(projector(features, mask)[0, k], expected)


def test_qformer_is_its_formula():
    """Written out with plain matrix products from the parameters: self-attention, cross-attention, feed forward."""
    projector = make("qformer", layers=2)
    features, mask = ragged((6, 3))

    def attend(block, x, context, valid):
        part = block.attention
        q, k, v = part.query(x), part.key(context), part.value(context)
        heads = []
        for h in range(4):
            s = slice(6 * h, 6 * h + 6)
            logits = (q[:, s] @ k[:, s].T / 6**0.5).masked_fill(~valid, -torch.inf)
            heads.append(logits.softmax(-1) @ v[:, s])
        out = block.output
        return out.LayerNorm(out.dense(torch.cat(heads, -1)) + x)

    for i in range(2):
        patches = projector.norm(features[i])
        x = projector.query_norm(projector.queries.weight)
        for layer in projector.encoder.layer:
            x = attend(layer.attention, x, x, torch.ones(5, dtype=torch.bool))
            x = attend(layer.crossattention, x, patches, mask[i])
            hidden = F.gelu(layer.intermediate_query.dense(x))
            x = layer.output_query.LayerNorm(layer.output_query.dense(hidden) + x)
        torch.testing.assert_close(projector(features, mask)[i], projector.output(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_no_parameter_is_idle(name):
    projector = make(name)
    tokens = projector(*ragged())
    (tokens * torch.randn_like(tokens)).sum().backward()
    projector.start_end().square().sum().backward()
    for key, parameter in projector.named_parameters():
        assert parameter.grad is not None, key
        # a bias on attention keys adds the same number to all logits of a softmax: its gradient is zero by nature
        assert key.endswith("attention.key.bias") or parameter.grad.abs().max() > 1e-12, key


def test_a_segment_without_valid_patches_gives_no_nan():
    projector = make("qformer")
    features, mask = ragged()
    mask[1] = False
    assert projector(features, mask).isfinite().all()


def test_boundaries_can_be_switched_off():
    assert make("mlp").start_end().shape == (2, 16)
    projector = make("mlp", boundaries=False)
    assert projector.start_end() is None
    assert not any("boundaries" in key for key in projector.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qfromer", {}, "did you mean 'qformer'"),
        ("qformer", {"token": 3}, "did you mean 'tokens'"),
        ("qformer", {"tokens": 0}, "tokens must be a whole number of at least 1, found 0"),
        ("qformer", {"hidden": 50, "heads": 4}, "must be a multiple of heads"),
        ("qformer", {"dropout": 1.5}, "dropout must be a number in"),
        ("mlp", {"stride": "two"}, "stride must be a whole number"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        build_projector(name, 10, 16, **options)
