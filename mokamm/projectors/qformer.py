"""The paper's projector: a small Q-Former (transformers' own classes) over the patches, then an MLP.

Cost: K (K + P) products of width `hidden` a layer and segment.

Axis letters: N segments in the batch, P patches, C feature width, K tokens per segment, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder

from mokamm.projectors.base import Positive, Projector, Rate, check_heads


class QFormerProjector(Projector):
    """LayerNorm, a small Q-Former over the patches, an MLP hidden -> D -> D with GELU.

    `tokens` learned queries go through `layers` of transformers' Q-Former, each with self-attention and
    cross-attention; there is no text input, so none of its parameters is idle.
    """

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
        intermediate: Positive | None = None,
        dropout: Rate = 0.0,
    ) -> None:
        check_heads(hidden, heads)
        super().__init__(in_features, out_features, boundaries)
        self.tokens = tokens
        config = Blip2QFormerConfig(
            vocab_size=1,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate or 4 * hidden,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            cross_attention_frequency=1,
            encoder_hidden_size=in_features,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
        self.queries = nn.Embedding(tokens, hidden)
        self.query_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.encoder = Blip2QFormerEncoder(config)
        self.output = nn.Sequential(nn.Linear(hidden, out_features), nn.GELU(), nn.Linear(out_features, out_features))
        self._reset()

    def num_tokens(self, patches: int) -> int:
        return self.tokens

    def kept(self, patches: int) -> int:
        c = self.encoder.config
        layer = 2 * patches * c.hidden_size + self.tokens * (16 * c.hidden_size + 3 * c.intermediate_size)
        rest = self.tokens * (c.hidden_size + 3 * self.out_features)
        return 2 * patches * self.in_features + c.num_hidden_layers * layer + rest

    def forward(self, features_NPC: Tensor, mask_NP: Tensor) -> Tensor:
        x_NPC = self._normed(features_NPC)
        query = self.query_norm(self.queries(torch.arange(self.tokens, device=x_NPC.device)))
        # a segment without any valid patch would be a softmax over nothing, that is NaN
        mask_NP = mask_NP | ~mask_NP.any(dim=1, keepdim=True)
        hidden = self.encoder(
            query.expand(len(x_NPC), -1, -1),
            encoder_hidden_states=x_NPC,
            encoder_attention_mask=mask_NP[:, None, None, :],
            query_length=self.tokens,
        ).last_hidden_state
        return self.output(hidden)
