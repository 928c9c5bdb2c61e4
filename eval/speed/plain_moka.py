"""MokA's layer as the paper's formula reads (arXiv 2506.05191), nothing made fast: what `eval/speed/adapters.py` compares.

    h = W x + B sum_m (A_m x_m + lambda Att_m)      x_m: the input with all tokens but those of modality m set to zero
    Att_m = softmax(A_m x_m (A_text x_q)^T / sqrt(r)) (A_text x_q)      for media, sample by sample; s = alpha/r in every A

Each A runs over every token, and each sample's question is cut out by its mask, which on a GPU waits for the device. The
same numbers as `mokamm.adapters.RoutedLinear` with scale_logits (tests/eval/test_speed.py). Shape legend: B batch, T tokens,
D width, R rank, M modalities, Q key tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Tokens:
    """The current batch's modality_ids and key_mask (B,T), shared by all layers of a model."""

    def __init__(self, modality_ids: Tensor, key_mask: Tensor) -> None:
        self.modality_ids, self.key_mask = modality_ids, key_mask


class PlainMokaLinear(nn.Module):
    def __init__(
        self, base_layer: nn.Linear, tokens: Tokens, r: int, alpha: float, modalities: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base_layer, self.tokens, self.r, self.scaling = base_layer, tokens, r, alpha / r
        like = {"device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.A = nn.ModuleList(nn.Linear(base_layer.in_features, r, bias=False, **like) for _ in range(modalities))
        self.B = nn.Linear(r, base_layer.out_features, bias=False, **like)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.B.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        ids_BT = self.tokens.modality_ids
        dropped_BTD = self.dropout(x_BTD)
        z_MBTR = [
            self.scaling * A(dropped_BTD * (ids_BT == m).unsqueeze(-1).to(x_BTD.dtype)) for m, A in enumerate(self.A)
        ]
        out = [
            torch.stack([self._sample(z_BTR[b], z_MBTR[0][b], m, b) for b in range(len(x_BTD))])
            for m, z_BTR in enumerate(z_MBTR)
        ]
        return self.base_layer(x_BTD) + self.B(sum(out[1:], start=out[0]))

    def _sample(self, z_TR: Tensor, text_TR: Tensor, modality: int, sample: int) -> Tensor:
        """One modality's part of one sample, with the attention where it is a medium."""
        if modality == 0:
            return z_TR
        key_QR = text_TR[self.tokens.key_mask[sample]]
        att_TR = torch.softmax(z_TR @ key_QR.T / math.sqrt(self.r), dim=-1) @ key_QR
        return z_TR + att_TR * (self.tokens.modality_ids[sample] == modality).unsqueeze(-1).to(z_TR.dtype)


def wrap_plain(
    model: nn.Module, names: list[str], tokens: Tokens, r: int, alpha: float, modalities: int, dropout: float = 0.0
) -> nn.Module:
    """The linear modules of these names replaced, in place; everything else frozen."""
    model.requires_grad_(False)
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = PlainMokaLinear(model.get_submodule(name), tokens, r, alpha, modalities, dropout)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), own, layer)
    return model
