"""Projectors: from an encoder's features to tokens of the LLM's width, one call for all segments of a modality.

    features (N,P,C) + mask (N,P) --LayerNorm--> qformer:   queries cross-attend to the patches     --MLP--> (N,K,D)
                                             |-> perceiver: latents attend to patches and latents --Linear-> (N,K,D)
                                             |-> mlp:       `stride` adjacent patches side by side  --MLP--> (N,K,D)
                                             \\-> pooled:    means of `tokens` equal stretches       --MLP--> (N,K,D)

One file each; a new one is a class (see `base.Projector`), a line here and its name in `mokamm/names.py`. A projector's
options are its keyword-only arguments, and their annotations say what they accept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.schema import UserError, nearest
from encoders.options import option_problems
from mokamm.projectors.base import Projector
from mokamm.projectors.mlp import MLPProjector
from mokamm.projectors.perceiver import PerceiverProjector
from mokamm.projectors.pooled import PooledProjector
from mokamm.projectors.qformer import QFormerProjector

__all__ = ["PROJECTORS", "Projector", "build_projector", "check_options"]

PROJECTORS: dict[str, type[Projector]] = {
    "qformer": QFormerProjector,
    "mlp": MLPProjector,
    "pooled": PooledProjector,
    "perceiver": PerceiverProjector,
}


def build_projector(
    name: str, in_features: int, out_features: int, boundaries: bool = True, **options: Any
) -> Projector:
    """The projector of that name; `options` are its keyword arguments (raises UserError on a wrong name or value)."""
    return check_options(name, options)(in_features, out_features, boundaries, **options)


def check_options(name: str, options: Mapping[str, Any]) -> type[Projector]:
    """The class of a projector. Raises UserError for an unknown name, or options that are none of its own."""
    if name not in PROJECTORS:
        raise UserError(f"unknown projector '{name}'{nearest(name, PROJECTORS)}")
    if problems := option_problems(options, PROJECTORS[name]):
        raise UserError(f"projector '{name}' " + "; ".join(problems))
    return PROJECTORS[name]
