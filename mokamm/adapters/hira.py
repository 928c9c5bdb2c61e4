"""HiRA in one matmul: y = (W0 * (1 + B A)) x + bias, with a frozen W0 of shape (out, in), A (r, in), B (out, r).

HiRA (Huang et al., ICLR 2025) changes a weight elementwise by a low-rank factor. PEFT's layer runs two whole matmuls
forward, W0 x and (W0 * B A) x, and three backward, and keeps W0 * B A, a matrix of W0's size, in between. Here:

    forward     W' = W0 * (1 + B A)      y  = W' x            one matmul; W' is forgotten
    backward    W' made again            dx = W'^T dy         one
                G = dy^T x               dB = (W0 * G) A^T,  dA = B^T (W0 * G)          one

Kept for the backward pass: x. A matmul of rank r and one elementwise pass over W0 come on top, each way.

The saved format is PEFT's HIRA. PEFT's own forward takes over wherever W' alone does not say it: dropout in training (it
falls on the adapter's input only), merged weights, quantized or trained base weights, transposed ones (Conv1D).

In bfloat16 W' is rounded as a whole, PEFT's sum of two outputs likewise: the error of y is the same (0.23 % of y, width
512), and an update below some 0.2 % of W0 is lost by both, here somewhat sooner.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mokamm.adapters.peft_bridge import HiraLinear, change_class
from mokamm.adapters.standing_in import is_bare, under_transform


class ModifiedMatmul(torch.autograd.Function):
    """(x, W0, B, A) -> x (W0 * (1 + B A))^T, with gradients for x, B and A; x (..., in), in the dtype of the matmul."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, B: Tensor, A: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, B, A)
        return x @ modified(weight, B @ A, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, B, A = ctx.saved_tensors
        dy = grads[0]
        dx = dy @ modified(weight, B @ A, dy.dtype) if ctx.needs_input_grad[0] else None
        G = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        dBA = G.to(A.dtype).mul_(weight)
        return dx, None, dBA @ A.T, B.T @ dBA


def modified(weight: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """W0 + W0 * change, computed in the wider of their dtypes."""
    return torch.addcmul(weight, weight, change).to(dtype)


class OneMatmulHira(HiraLinear):
    """PEFT's layer with the forward of this file, where it applies."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.hira_A]
        if self.disable_adapters or not self._one_matmul_does(names):
            return super().forward(x, *args, **kwargs)
        base = cast(nn.Linear, self.get_base_layer())
        weight = base.weight
        # several adapters add up: 1 + sum of B A = 1 + [B B ..] [A; A; ..]
        B = torch.cat([self.hira_B[name] for name in names], 1) if len(names) > 1 else self.hira_B[names[0]]
        A = torch.cat([self.hira_A[name] for name in names]) if len(names) > 1 else self.hira_A[names[0]]
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):  # B A as exactly as it is stored
            y = ModifiedMatmul.apply(x.to(dtype), weight, B, A)
        return y if base.bias is None else y + base.bias.to(dtype)

    def _one_matmul_does(self, names: list[str]) -> bool:
        plain = is_bare(self.base_layer, nn.Linear, globally=False) and not self.base_layer.weight.requires_grad
        dropped = any(self.training and isinstance(self.hira_dropout[name], nn.Dropout) for name in names)
        return bool(names) and plain and not dropped and not self.merged and not under_transform()


def use_one_matmul(model: nn.Module) -> nn.Module:
    """Lets every HiRA layer of PEFT's in a model compute in one matmul."""
    return change_class(model, HiraLinear, OneMatmulHira)
