"""A perceiver resampler (Flamingo, arXiv 2204.14198): learned latents read the patches in a few layers.

In each layer the latents are queries, and the patches *and the latents themselves* are keys and values, each with a
norm of its own; a feed-forward block follows. There is no softmax over nothing: latents are always there to attend to.

    x = x + Attention(q = LN(x), k = v = [LN(patches); LN(x)]);  x = x + W2 GELU(W1 LN(x));  tokens = W LN(x)

Projections of the attention have no bias, as published. Cost: K (K + P) products of width `hidden` a layer and segment.

Axis letters: N segments in the batch, P patches, C feature width, K tokens per segment, D model width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mokamm.projectors.base import Positive, Projector, check_heads


class ResamplerLayer(nn.Module):
    """Attention of the latents to [patches; latents], then a feed-forward block of four times the width."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.patch_norm, self.latent_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key_value = nn.Linear(hidden, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )

    def forward(self, x_NKh: Tensor, patches_NPh: Tensor, mask_NL: Tensor) -> Tensor:
        """`mask` (N, P + K): which of [patches; latents] may be attended to."""
        latents = self.latent_norm(x_NKh)
        context = torch.cat([self.patch_norm(patches_NPh), latents], dim=1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(latents), *self.key_value(context).chunk(2, dim=-1))
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NL[:, None, None, :])
        x_NKh = x_NKh + self.out(read.transpose(1, 2).flatten(2))
        return x_NKh + self.feed_forward(x_NKh)


class PerceiverProjector(Projector):
    """LayerNorm, Linear to `hidden`, `layers` of the resampler over `tokens` latents, LayerNorm, Linear to D."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        boundaries: bool = True,
        *,
        tokens: Positive = 32,
        hidden: Positive = 768,
        layers: Positive = 2,
        heads: Positive = 12,
    ) -> None:
        check_heads(hidden, heads)
        super().__init__(in_features, out_features, boundaries)
        self.tokens = tokens
        self.input = nn.Linear(in_features, hidden)
        self.latents = nn.Embedding(tokens, hidden)  # called, not read: see Projector
        self.layers = nn.ModuleList(ResamplerLayer(hidden, heads) for _ in range(layers))
        self.output = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, out_features))
        self._reset()

    def num_tokens(self, patches: int) -> int:
        return self.tokens

    def kept(self, patches: int) -> int:
        hidden, layers = self.input.out_features, len(self.layers)
        layer = 3 * (patches + self.tokens) * hidden + 15 * self.tokens * hidden
        return patches * (2 * self.in_features + hidden) + layers * layer + 2 * self.tokens * hidden

    def forward(self, features_NPC: Tensor, mask_NP: Tensor) -> Tensor:
        patches_NPh = self.input(self._normed(features_NPC))
        latents = self.latents(torch.arange(self.tokens, device=patches_NPh.device))
        x_NKh = latents.expand(len(patches_NPh), -1, -1)
        mask_NL = F.pad(mask_NP, (0, self.tokens), value=True)
        for layer in self.layers:
            x_NKh = layer(x_NKh, patches_NPh, mask_NL)
        return self.output(x_NKh)
