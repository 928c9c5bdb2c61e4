"""What every projector is: features of N segments in, K tokens of the LLM's width for each out.

Each segment is projected alone. K = num_tokens(P); a segment with fewer valid patches uses only its first
num_tokens(valid patches) tokens, and its masked patches have no influence on them. The learned start and end vectors
that frame a media item are part of the projector. All parameters train: none is idle.

Axis letters: N segments in the batch, P patches, C feature width, K tokens per segment, D model width.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from data.schema import UserError

INITIALIZER_RANGE = 0.02
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]  # of dropout


class Projector(nn.Module):
    """What every projector shares: the input norm and the boundary vectors (row 0 start, row 1 end).

    The boundary vectors are an embedding and are read by calling it, never as a bare parameter: a call is what lets
    ZeRO-3 gather them.
    """

    def __init__(self, in_features: int, out_features: int, boundaries: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.norm = nn.LayerNorm(in_features)
        self.boundaries = nn.Embedding(2, out_features) if boundaries else None

    def num_tokens(self, patches: int) -> int:
        """Tokens of a segment with this many valid patches."""
        raise NotImplementedError

    def kept(self, patches: int) -> int:
        """About how many elements stay in memory for the backward pass of a segment (mokamm/training/memory.py)."""
        raise NotImplementedError

    def forward(self, features_NPC: Tensor, mask_NP: Tensor) -> Tensor:
        """Tokens (N,K,D) of all segments; `mask` is true at valid patches, which come first in each segment."""
        raise NotImplementedError

    def start_end(self) -> Tensor | None:
        """The vectors (2,D) set before and after each media item, or None where they are switched off."""
        if self.boundaries is None:
            return None
        return self.boundaries(torch.arange(2, device=self.norm.weight.device))

    def _normed(self, features_NPC: Tensor) -> Tensor:
        if features_NPC.shape[-1] != self.in_features:
            raise UserError(
                f"the projector takes features of width {self.in_features}, but the encoder gives "
                f"{features_NPC.shape[-1]}; name the encoder, and its layers, that the projector was built for"
            )
        return self.norm(features_NPC.to(self.norm.weight.dtype))

    def _reset(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # BERT's 0.02 is Xavier's for width ~800 only; this keeps the scale in narrow projectors too
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INITIALIZER_RANGE)


def check_heads(hidden: int, heads: int) -> None:
    """Raises UserError where attention cannot divide its width among its heads."""
    if hidden % heads:
        raise UserError(f"the projector's hidden ({hidden}) must be a multiple of its heads ({heads})")
