"""Projectors: from an encoder's features to tokens of the LLM's width, one call for all segments of a modality.

    features (N,P,C) + mask (N,P) --LayerNorm--> qformer: queries cross-attend to the patches --MLP--> tokens (N,K,D)
                                             \\-> mlp: `stride` adjacent patches side by side --MLP--> tokens (N,K,D)

Each segment is projected alone. K = num_tokens(P); a segment with fewer valid patches uses only its first
num_tokens(valid patches) tokens. The learned start and end vectors that frame a media item are part of the projector.
Cost of the Q-Former: K (K + P) products of width `hidden` a layer and segment; of the MLP: one GEMM over the patches.

Axis letters: N segments in the batch, P patches, C feature width, K tokens per segment, D model width.
"""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerEncoder

from data.schema import UserError, nearest

INITIALIZER_RANGE = 0.02


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
            raise ValueError(f"projector takes features of width {self.in_features}, got {tuple(features_NPC.shape)}")
        return self.norm(features_NPC.to(self.norm.weight.dtype))

    def _reset(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # BERT's 0.02 is Xavier's for width ~800 only; this keeps the scale in narrow projectors too
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INITIALIZER_RANGE)


class QFormerProjector(Projector):
    """The paper's projector: LayerNorm, a small Q-Former over the patches, an MLP hidden -> D -> D with GELU.

    `tokens` learned queries go through `layers` of transformers' Q-Former, each with self-attention and
    cross-attention; there is no text input, so none of its parameters is idle.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        boundaries: bool = True,
        *,
        tokens: int = 32,
        hidden: int = 768,
        layers: int = 2,
        heads: int = 12,
        intermediate: int | None = None,
        dropout: float = 0.0,
    ) -> None:
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


class MLPProjector(Projector):
    """LayerNorm, `stride` adjacent patches side by side (zeros beyond the last valid one), Linear, GELU, Linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        boundaries: bool = True,
        *,
        stride: int = 1,
        hidden: int | None = None,
    ) -> None:
        super().__init__(in_features, out_features, boundaries)
        self.stride = stride
        hidden = hidden or out_features
        self.output = nn.Sequential(nn.Linear(stride * in_features, hidden), nn.GELU(), nn.Linear(hidden, out_features))
        self._reset()

    def num_tokens(self, patches: int) -> int:
        return math.ceil(patches / self.stride)

    def forward(self, features_NPC: Tensor, mask_NP: Tensor) -> Tensor:
        x_NPC = self._normed(features_NPC) * mask_NP[..., None]
        x_NPC = nn.functional.pad(x_NPC, (0, 0, 0, -x_NPC.shape[1] % self.stride))
        return self.output(x_NPC.reshape(len(x_NPC), -1, self.stride * self.in_features))


PROJECTORS: dict[str, type[Projector]] = {"qformer": QFormerProjector, "mlp": MLPProjector}


def build_projector(
    name: str, in_features: int, out_features: int, boundaries: bool = True, **options: int | float | None
) -> Projector:
    """The projector of that name; `options` are its keyword arguments (raises UserError on a wrong name or value)."""
    if name not in PROJECTORS:
        raise UserError(f"unknown projector '{name}'{nearest(name, PROJECTORS)}")
    cls = PROJECTORS[name]
    known = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in known:
            raise UserError(f"projector '{name}': unknown option '{option}'{nearest(option, known)}")
        if option == "dropout":
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"projector '{name}': dropout must be a number in [0, 1), found {value!r}")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"projector '{name}': {option} must be a whole number of at least 1, found {value!r}")
    hidden, heads = options.get("hidden", 768), options.get("heads", 12)
    if name == "qformer" and isinstance(hidden, int) and isinstance(heads, int) and hidden % heads:
        raise UserError(f"projector 'qformer': hidden ({hidden}) must be a multiple of heads ({heads})")
    return cls(in_features, out_features, boundaries, **options)  # type: ignore[arg-type]
