"""A chosen number of tokens by averaging: the patches are cut into that many equal stretches, each mean through an MLP.

The stretches are those of adaptive average pooling: stretch k of K over p valid patches is floor(k p / K) up to, not
including, ceil((k + 1) p / K), so that neighbours share a patch where p is no multiple of K. A segment of fewer patches
than `tokens` gives one token a patch. Patches are taken in the encoder's order: a picture's along its rows, a sound's
in time.

Cost: one (K,P) by (P,C) product a segment, then one GEMM over the tokens.

Axis letters: N segments in the batch, P patches, C feature width, K tokens per segment, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mokamm.projectors.base import Positive, Projector


class PooledProjector(Projector):
    """LayerNorm, adaptive average pooling of the valid patches to `tokens`, Linear, GELU, Linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        boundaries: bool = True,
        *,
        tokens: Positive = 32,
        hidden: Positive | None = None,
    ) -> None:
        super().__init__(in_features, out_features, boundaries)
        self.tokens, self.hidden = tokens, hidden or out_features
        self.output = nn.Sequential(
            nn.Linear(in_features, self.hidden), nn.GELU(), nn.Linear(self.hidden, out_features)
        )
        self._reset()

    def num_tokens(self, patches: int) -> int:
        return min(self.tokens, patches)

    def kept(self, patches: int) -> int:
        tokens = self.num_tokens(patches)
        token = patches + self.in_features + 2 * self.hidden  # weights, mean, before and after GELU
        return patches * self.in_features + tokens * token

    def forward(self, features_NPC: Tensor, mask_NP: Tensor) -> Tensor:
        x_NPC = self._normed(features_NPC).masked_fill(~mask_NP[..., None], 0.0)
        inside_NKP = stretches(mask_NP.sum(1), self.tokens, mask_NP.shape[1]).to(x_NPC.dtype)
        return self.output(inside_NKP @ x_NPC / inside_NKP.sum(-1, keepdim=True).clamp_min(1.0))


def stretches(valid_N: Tensor, tokens: int, patches: int) -> Tensor:
    """Which patches a token averages (N,K,P), for `valid` patches each; K = min(tokens, patches), unused rows empty."""
    token_K = torch.arange(min(tokens, patches), device=valid_N.device)
    patch_P = torch.arange(patches, device=valid_N.device)
    valid = valid_N[:, None]
    own = valid.clamp(1, tokens)  # this segment's K
    start_NK = (token_K * valid).div(own, rounding_mode="floor")
    end_NK = ((token_K + 1) * valid + own - 1).div(own, rounding_mode="floor")
    return (patch_P >= start_NK[..., None]) & (patch_P < end_NK[..., None]) & (token_K < own)[..., None]
