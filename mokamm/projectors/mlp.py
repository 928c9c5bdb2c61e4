"""Adjacent patches side by side through an MLP: every patch counts, `stride` of them to a token.

Cost: one GEMM over the patches.

Axis letters: N segments in the batch, P patches, C feature width, K tokens per segment, D model width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from mokamm.projectors.base import Positive, Projector


class MLPProjector(Projector):
    """LayerNorm, `stride` adjacent patches side by side (zeros beyond the last valid one), Linear, GELU, Linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        boundaries: bool = True,
        *,
        stride: Positive = 1,
        hidden: Positive | None = None,
    ) -> None:
        super().__init__(in_features, out_features, boundaries)
        self.stride, self.hidden = stride, hidden or out_features
        self.output = nn.Sequential(
            nn.Linear(stride * in_features, self.hidden), nn.GELU(), nn.Linear(self.hidden, out_features)
        )
        self._reset()

    def num_tokens(self, patches: int) -> int:
        return math.ceil(patches / self.stride)

    def kept(self, patches: int) -> int:
        return 2 * patches * self.in_features + 2 * self.num_tokens(patches) * self.hidden

    def forward(self, features_NPC: Tensor, mask_NP: Tensor) -> Tensor:
        x_NPC = self._normed(features_NPC) * mask_NP[..., None]
        x_NPC = nn.functional.pad(x_NPC, (0, 0, 0, -x_NPC.shape[1] % self.stride))
        return self.output(x_NPC.reshape(len(x_NPC), -1, self.stride * self.in_features))
