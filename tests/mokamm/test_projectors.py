"""Projectors against plain formulas: shapes, masks, independence of segments, and no idle parameter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from data.schema import UserError
from mokamm.projectors import PROJECTORS, build_projector

OPTIONS = {
    "qformer": {"tokens": 5, "hidden": 24, "heads": 4, "layers": 2},
    "perceiver": {"tokens": 5, "hidden": 24, "heads": 4, "layers": 2},
    "mlp": {"stride": 3, "hidden": 20},
    "pooled": {"tokens": 3, "hidden": 20},
}


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


@pytest.mark.parametrize("patches", [1, 2, 3, 5, 7, 9])
def test_pooled_is_adaptive_average_pooling(patches):
    """torch's own on each segment alone; a segment of fewer patches than tokens keeps one a patch."""
    projector = make("pooled", tokens=4)
    features, mask = ragged((9, patches))
    normed = F.layer_norm(features[1, :patches], (10,), projector.norm.weight, projector.norm.bias)
    means = F.adaptive_avg_pool1d(normed.T[None], min(4, patches))[0].T
    found = projector(features, mask)[1, : min(4, patches)]
    torch.testing.assert_close(found, projector.output(means), rtol=0, atol=1e-12)
    assert projector.num_tokens(patches) == min(4, patches)


def test_perceiver_is_its_formula():
    """Loops over latents and heads, from the parameters."""
    projector = make("perceiver")
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.4)
    features, mask = ragged((6, 3))
    found = projector(features, mask)
    for i, valid in enumerate((6, 3)):
        patches = projector.input(projector.norm(features[i, :valid]))
        x = projector.latents.weight
        for layer in projector.layers:
            latents = F.layer_norm(x, (24,), layer.latent_norm.weight, layer.latent_norm.bias)
            context = torch.cat([F.layer_norm(patches, (24,), layer.patch_norm.weight, layer.patch_norm.bias), latents])
            q = latents @ layer.query.weight.T
            k, v = context @ layer.key_value.weight[:24].T, context @ layer.key_value.weight[24:].T
            rows = []
            for t in range(5):
                heads = []
                for h in range(4):
                    s = slice(6 * h, 6 * h + 6)
                    heads.append((q[t, s] @ k[:, s].T / 6**0.5).softmax(-1) @ v[:, s])
                rows.append(torch.cat(heads))
            x = x + torch.stack(rows) @ layer.out.weight.T
            norm, first, _, last = layer.feed_forward
            inner = F.gelu(F.layer_norm(x, (24,), norm.weight, norm.bias) @ first.weight.T + first.bias)
            x = x + inner @ last.weight.T + last.bias
        torch.testing.assert_close(found[i], projector.output(x), rtol=0, atol=1e-11)


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


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_a_segment_without_valid_patches_gives_no_nan(name):
    projector = make(name)
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
        ("qformer", {"token": 3}, "'qformer' has no option 'token'; did you mean 'tokens'"),
        ("qformer", {"tokens": 0}, "option 'tokens' should be greater than or equal to 1; found 0"),
        ("qformer", {"tokens": True}, "option 'tokens' should be a valid integer; found True"),
        ("qformer", {"hidden": 50, "heads": 4}, r"hidden \(50\) must be a multiple of its heads \(4\)"),
        ("perceiver", {"hidden": 50}, r"hidden \(50\) must be a multiple of its heads \(12\)"),
        ("qformer", {"dropout": 1.5}, "option 'dropout' should be less than 1; found 1.5"),
        ("mlp", {"stride": "two"}, "option 'stride' should be a valid integer; found 'two'"),
        ("pooled", {"tokens": 2.5, "stride": 2}, "'tokens' should be a valid integer.*; has no option 'stride'"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        build_projector(name, 10, 16, **options)


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_features_of_another_width_are_refused(name):
    with pytest.raises(UserError, match="takes features of width 10, but the encoder gives 12"):
        make(name)(*ragged(width=12))
