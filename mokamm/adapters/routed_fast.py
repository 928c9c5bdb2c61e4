r"""The routed layer's fast path: the same numbers as `routed.py`'s plain one, by hand-written derivatives.

Where the base layers are plain, frozen Linears, those that read the same input (q, k, v; gate, up) are one function:

    x --> W_i x + s z_i B_i^T        `_Together`: u = [A_1; A_2; ..] x by one GEMM, the rank space once for all of them

Everywhere else (ZeRO-3, quantised weights, hooks, several adapters, ...) the base layer is called as a module:

    x --_Down--> x' --base layer--> h --_Up--> h + s z B^T         _Down: u = A x, and hands x on to the base layer as x'
          \----> u ------------------^                             _Up:   z from u

so that _Down's backward gets the gradient dx' of the base layer and du together. _Down and _Up run inside the forward of
the modules that own A and B: whatever hangs on these (ZeRO-3 gathers a module's weights before its forward and its
backward) finds them as usual. Both ways

- add s z B^T into the base layer's output in place, and du A into the input's gradient, each by one GEMM;
- keep for backward x and the picked rows (N,r), as much as LoRA keeps, or less: x is the one that q, k and v share, also
  with dropout, of which they keep the mask; a frozen A keeps no x. Logits, softmax and z are computed again;
- compute in x's dtype: no float32 copy of x beside a float32 adapter.

Cost beside W x: GEMMs of width M*r (r more where a token is padding) and r, and six small kernels forward. Measured by
`eval/speed/adapters.py`. A second derivative is refused. Shape legend: N = B*T, D width, R rank, M modalities;
`routed_plan.py` has the rank space.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mokamm.adapters.frozen_tuner import FrozenA
from mokamm.adapters.routed_plan import (
    Plan,
    add_update,
    as_dtype,
    attended,
    attention,
    attention_backward,
    pick,
    place,
    split_a,
    stacked_a,
    update_backward_b,
    update_backward_z,
)

_AS_IT_IS = nullcontext()


def together(
    x: Tensor, linears: list[Any], a: list[Any], b: list[Any], plan: Plan, dropout: float
) -> tuple[Tensor, ...]:
    """Outputs of frozen Linears with their adapters, for one input that all of them read."""
    own = [linear._parameters for linear in linears]
    weights, biases = [p["weight"] for p in own], [p["bias"] for p in own]
    return _Together.apply(x, plan, dropout, *weights, *biases, *a, *b)


class DownProjection(nn.Linear):
    """The modalities' A, stacked (M*r, D). Called with a plan: x', u of `_Down`; without: A x."""

    def forward(self, x: Tensor, plan: Plan | None = None, dropout: float = 0.0) -> Any:  # type: ignore[override]
        """dropout: of the x that A reads."""
        if plan is None:
            return super().forward(x)
        passed, u = _Down.apply(x, self.weight, plan, dropout)
        return (passed if x.requires_grad else x), u


class FrozenDownProjection(FrozenA, DownProjection):
    """The modalities' A where it is drawn and never trains."""


class UpProjection(nn.Linear):
    """B (D, r or M*r). Called with the base layer's output and a plan: h of `_Up`; without: B z."""

    def forward(self, z: Tensor, h: Tensor | None = None, plan: Plan | None = None) -> Tensor:
        return super().forward(z) if h is None else _Up.apply(h, z, self.weight, plan)


class _Together(torch.autograd.Function):
    """x, W_1.., bias_1.., A_1.., B_1.. -> W_i x + bias_i + s z_i B_i^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, dropout: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        L = plan.layers
        weights, biases, a, b = tensors[:L], tensors[L : 2 * L], tensors[2 * L : 3 * L], tensors[3 * L :]
        x_ND, outs = _flat(x), []
        with _exact(x):
            weights = tuple(as_dtype(weight, x.dtype) for weight in weights)
            u, masks = _down(x_ND, a, plan, dropout)
            own = pick(u, plan)
            z = attended(own, *attention(own, plan), plan)
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                h_ND = nn.functional.linear(x_ND, weight, None if bias is None else as_dtype(bias, x.dtype))
                outs.append(_like(x, add_update(h_ND, z[i], b[i], plan, in_place=True)))
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.dropout, ctx.shape = plan, dropout, x.shape
        kept = weights if ctx.needs_input_grad[0] else tensors[:L]  # under autocast these are copies
        read = x if any(ctx.needs_input_grad[3 + 2 * L : 3 + 3 * L]) else None  # a frozen A wants no x
        ctx.save_for_backward(read, own, *kept, *a, *b, *masks)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, L = ctx.plan, ctx.plan.layers
        x, own, *tensors = ctx.saved_tensors
        weights, a, b, masks = tensors[:L], tensors[L : 2 * L], tensors[2 * L : 3 * L], tensors[3 * L :]
        needs = ctx.needs_input_grad
        needs_x, needs_a, needs_b = needs[0], any(needs[3 + 2 * L : 3 + 3 * L]), needs[3 + 3 * L :]
        dx_ND: Tensor | None = None
        db: list[Tensor | None] = [None] * L
        with _exact(own):
            key_p = attention(own, plan)
            z, dz = attended(own, *key_p, plan), []
            for i, g in enumerate(gradients):
                if g is None:
                    dz.append(torch.zeros_like(z[i]))
                    continue
                g_ND = _flat(g)
                dz.append(update_backward_z(g_ND, b[i], plan))
                if needs_b[i]:
                    db[i] = update_backward_b(g_ND, z[i], b[i], plan)
                if needs_x:
                    dx_ND = g_ND @ weights[i] if dx_ND is None else dx_ND.addmm_(g_ND, weights[i])
            du = place(attention_backward(dz[0] if L == 1 else torch.cat(dz), own, *key_p, plan), plan)
            dx_ND, da = _down_backward(x, a, plan, ctx.dropout, masks, du, dx_ND, True, needs_x, needs_a)
        dx = None if dx_ND is None else dx_ND.view(ctx.shape)
        return dx, None, None, *(None,) * (2 * L), *da, *db


class _Down(torch.autograd.Function):
    """x, A -> x itself, A dropout(x) (N, blocks*r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: Plan, dropout: float) -> tuple[Tensor, Tensor]:
        with _exact(x):
            u, masks = _down(_flat(x), (weight,), plan, dropout)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.dropout, ctx.shape = plan, dropout, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *masks)
        return x, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        if du is None:
            return dx, None, None, None
        x, weight, *masks = ctx.saved_tensors
        dx_ND = None if dx is None else _flat(dx)
        needs_x, needs_a, *_ = ctx.needs_input_grad
        with _exact(du):
            dx_ND, (da,) = _down_backward(
                x, (weight,), ctx.plan, ctx.dropout, masks, du, dx_ND, False, needs_x, needs_a
            )
        return None if dx_ND is None else dx_ND.view(ctx.shape), da, None, None


class _Up(torch.autograd.Function):
    """h, u, B -> h + s z B^T."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, u: Tensor, weight: Tensor, plan: Plan) -> Tensor:
        with _exact(h):
            own = pick(u, plan)
            (z,) = attended(own, *attention(own, plan), plan)
            out = _like(h, add_update(_flat(h), z, weight, plan, in_place=False))
        ctx.plan = plan
        ctx.save_for_backward(own, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        own, weight = ctx.saved_tensors
        plan, g_ND, du, db = ctx.plan, _flat(g), None, None
        with _exact(g):
            key_p = attention(own, plan)
            if ctx.needs_input_grad[2]:
                (z,) = attended(own, *key_p, plan)
                db = update_backward_b(g_ND, z, weight, plan)
            if ctx.needs_input_grad[1]:
                dz = update_backward_z(g_ND, weight, plan).to(own.dtype)
                du = place(attention_backward(dz, own, *key_p, plan), plan)
        return g, du, db, None


def _down(x_ND: Tensor, a: Sequence[Tensor], plan: Plan, dropout: float) -> tuple[Tensor, list[Tensor]]:
    """u of all layers; with dropout, each layer's mask."""
    stacked = stacked_a(a, plan, x_ND.dtype)
    if not dropout:
        return nn.functional.linear(x_ND, stacked), []
    dropped = [_drop(x_ND, dropout) for _ in a]
    parts = [x @ part.t() for (x, _), part in zip(dropped, stacked.chunk(plan.layers), strict=True)]
    return torch.cat(parts, dim=1), [mask for _, mask in dropped]


def _drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x without a share p of its elements, scaled as dropout does, and the mask of those that are left."""
    if x.device.type != "cpu":
        return torch.native_dropout(x, p, True)  # one kernel
    left = torch.empty_like(x).bernoulli_(1 - p)  # times a bool would be several times as slow
    return (x * left).div_(1 - p), left.bool()


def _down_backward(
    x: Tensor | None, a: Sequence[Tensor], plan: Plan, dropout: float, masks: list[Tensor], du: Tensor,
    dx_ND: Tensor | None, own: bool, needs_x: bool, needs_a: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """dx + du A, and dA = du^T x of every layer. x: None where no A trains; own: dx may be changed in place."""
    if plan.layers == 1 and plan.blocks > plan.at.modalities:  # without the block of zeros
        stacked, du = as_dtype(a[0], du.dtype), du[:, : plan.at.modalities * plan.at.r]
    else:
        stacked = stacked_a(a, plan, du.dtype)
    da: list[Tensor] = []
    if not masks:
        if needs_a and x is not None:
            da.append(du.t() @ _flat(x))
        if needs_x and dx_ND is None:
            dx_ND = du @ stacked
        elif needs_x and dx_ND is not None:
            dx_ND = dx_ND.addmm_(du, stacked) if own else torch.addmm(dx_ND, du, stacked)
    else:
        parts = zip(masks, stacked.chunk(plan.layers), (du / (1 - dropout)).chunk(plan.layers, dim=1), strict=True)
        for mask, part, own_du in parts:
            left = mask.to(du.dtype) if mask.device.type == "cpu" else mask  # see _drop
            if needs_a and x is not None:
                da.append(own_du.t() @ (_flat(x) * left))
            if needs_x:
                more_ND = (own_du @ part).mul_(left)
                dx_ND = more_ND if dx_ND is None else more_ND.add_(dx_ND)
    if not da:
        return dx_ND, [None] * len(a)
    return dx_ND, [*split_a(da[0] if len(da) == 1 else torch.cat(da), a, plan)]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _like(x: Tensor, out_ND: Tensor) -> Tensor:
    """Laid out as x is; no view to autograd, which would refuse what others do with an output in place."""
    return torch.ops.aten._unsafe_view(out_ND, (*x.shape[:-1], out_ND.shape[-1]))


def _exact(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, where it is on: everything here has x's dtype already."""
    return torch.autocast(x.device.type, enabled=False) if torch._C._is_any_autocast_enabled() else _AS_IT_IS
