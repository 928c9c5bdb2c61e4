"""A low-rank update inside a weight, W' = W + b a, that can be taken out again without a trace.

In floating point (W + d) - d is not always W. So the update is added in a dtype wider than the weight's, and the few
entries that subtraction would not bring back to the bit are kept beside its factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from mokamm.routing import AdapterError

FOLDED = "The text path is folded into the weights, where it does not train: unfold_text() first."
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as an element


@dataclass(frozen=True)
class Fold:
    """What takes a folded update out again: its factors b (D_out, r) and a (r, D_in), and the entries of W kept."""

    b: Tensor
    a: Tensor
    transposed: bool
    index: tuple[Tensor, ...]
    value: Tensor

    @classmethod
    @torch.no_grad()
    def into(cls, weight: Tensor, b: Tensor, a: Tensor, transposed: bool) -> Fold:
        """Adds b a to the weight, in place. transposed: the weight is kept as (D_in, D_out), as Conv1D does."""
        delta = _update(b, a, weight, transposed)
        folded = (weight.to(delta.dtype) + delta).to(weight.dtype)
        back, bits = (folded.to(delta.dtype) - delta).to(weight.dtype), BITS[weight.element_size()]
        index = (back.view(bits) != weight.view(bits)).nonzero(as_tuple=True)
        fold = cls(b, a, transposed, index, weight[index])
        weight.copy_(folded)
        return fold

    @torch.no_grad()
    def out_of(self, weight: Tensor) -> None:
        """Takes it out of the weight, in place, which is then what it was before `into`, to the bit."""
        device = weight.device  # it may have moved since
        delta = _update(self.b.to(device), self.a.to(device), weight, self.transposed)
        weight.copy_((weight.to(delta.dtype) - delta).to(weight.dtype))
        weight[tuple(index.to(device) for index in self.index)] = self.value.to(device)


class WithoutDerivative(torch.autograd.Function):
    """A folded layer's output as it is: its derivative by A and B would lack what W holds of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor) -> Tensor:  # type: ignore[override]
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise AdapterError(f"{FOLDED} For gradients of inputs alone: model.requires_grad_(False).")


def _update(b: Tensor, a: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """b a, laid out like the weight, in a dtype wider than its own, so that few entries are lost."""
    wide = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else torch.float64
    delta = b.to(wide) @ a.to(wide)
    return delta.T if transposed else delta
