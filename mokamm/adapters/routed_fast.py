r"""The routed layer's fast path: the same numbers as `routed.py`'s plain one, by two hand-written derivatives.

    x --Down--> x' --base layer--> h --Up--> h + s z B^T          Down: u = A x, and hands x on to the base layer as x'
         \----> u  (N,(M+1)*r) ------^                           Up:   z = u_own + lambda softmax(l u_own k^T) k

Where the plain path leaves 30 operators and a dozen tensors of (N,D) to autograd, this one

- hands x through Down, so that Down's backward gets the gradient dx' of the base layer and that of u together, and the
  whole dx = dx' + du A is one GEMM that accumulates, whatever the base layer is;
- adds s z B^T into the base layer's output in place, by one GEMM, where that output is nobody else's;
- keeps for backward x and the chosen rows u_own (N,r), as much as LoRA keeps, or less: x is the one that q, k and v share,
  also with dropout, of which it keeps the mask. Logits, softmax and z are computed again.

A is padded by a block of zeros, the path of padding tokens, so that choosing each token's own block is one gather of rows
without any mask. Keys get one more column, a sink that takes all the weight of tokens without attention; it is left out of
the sum. So the number of operators depends on nothing, and none waits for the device.

Down and Up run inside the forward of the modules that own A and B, so that whatever hangs on these modules (ZeRO-3 gathers
a module's weights before its forward and backward) finds them as usual. Everything is computed in x's dtype: no float32 copy
of x beside a float32 adapter. Cost beside W x: GEMMs of width (M+1)*r and r, and six small kernels forward. Measured by
`eval/speed/adapters.py`. Shape legend: N = B*T, B batch, T tokens, D width, R rank, M modalities, Q key tokens, K = Q + 1.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mokamm.routing import Routing


@dataclass(frozen=True)
class Settings:
    """What a layer keeps of one adapter's config."""

    r: int
    scaling: float
    modalities: int
    attention_weight: float
    logit_scale: float  # of scaled queries with unscaled keys
    shared_b: bool


@dataclass(frozen=True)
class Choice:
    """A batch's routing as a layer with these settings reads it; without a routing, all is text."""

    at: Settings
    routing: Routing | None

    @property
    def blocks(self) -> int:
        """Blocks of r columns in u: one a modality and one of zeros; text alone is one block."""
        return 1 if self.routing is None else self.at.modalities + 1

    @property
    def keys(self) -> int:
        """Q; the columns after these are the sink and the padding of K."""
        assert self.routing is not None
        assert self.routing.key_index is not None
        return self.routing.key_index.shape[1]

    @property
    def attends(self) -> bool:
        return self.routing is not None and self.at.attention_weight != 0 and self.at.modalities > 1


class DownProjection(nn.Linear):
    """The modalities' A, stacked (M*r, D). Called with a choice: x', u of `_Down`; without: A x."""

    def forward(  # type: ignore[override]
        self, x: Tensor, choice: Choice | None = None, dropout: float = 0.0, own: bool = False
    ) -> Any:
        """dropout: of the x that A reads. own: the gradient that x' gets is nobody else's, and may be changed."""
        if choice is None:
            return super().forward(x)
        rows = min(choice.blocks, choice.at.modalities) * choice.at.r
        passed, u = _Down.apply(x, self.weight, rows, choice.blocks * choice.at.r, dropout, own)
        return (passed if x.requires_grad else x), u


class UpProjection(nn.Linear):
    """B (D, r or M*r). Called with the base layer's output and a choice: h of `Up`; without: B z."""

    def forward(self, z: Tensor, h: Tensor | None = None, choice: Choice | None = None, own: bool = False) -> Tensor:
        """own: h is nobody else's, and may be changed in place."""
        if h is None:
            return super().forward(z)
        return _Up.apply(h, z, self.weight, choice, own)


class _Down(torch.autograd.Function):
    """x, A -> x itself, A dropout(x) (N, columns): the first `rows` of A, and zeros up to `columns`.

    Of dropout the mask is kept (a byte an element), not the dropped x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: int, columns: int, dropout: float, own: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.dropout, ctx.own = rows, dropout, own
        x_ND = x.reshape(-1, x.shape[-1])
        with _exact(x):
            if dropout:
                x_ND, mask_ND = torch.native_dropout(x_ND, dropout, True)
            ctx.save_for_backward(x, weight, *((mask_ND,) if dropout else ()))
            a = nn.functional.pad(weight[:rows], (0, 0, 0, columns - rows)).to(x.dtype)
            return x, x_ND @ a.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
        if du is None:
            return dx, None, None, None, None, None
        x, weight, *masks = ctx.saved_tensors
        x_ND, da = x.reshape(-1, x.shape[-1]), None
        du = du[:, : ctx.rows]
        with _exact(x):
            if masks:
                x_ND, du = x_ND * masks[0], du / (1 - ctx.dropout)
            if ctx.needs_input_grad[1]:
                da = (du.t() @ x_ND).to(weight.dtype)
                if len(da) < len(weight):
                    da = nn.functional.pad(da, (0, 0, 0, len(weight) - len(da)))
            if ctx.needs_input_grad[0]:
                a = weight[: ctx.rows].to(x.dtype)
                dx_ND = None if dx is None else dx.reshape(-1, x.shape[-1])
                if masks:
                    more = torch.mm(du, a, out=x_ND).mul_(masks[0])  # x_ND is a copy of its own here
                    dx_ND = more if dx_ND is None else more.add_(dx_ND)
                elif dx_ND is None:
                    dx_ND = du @ a
                else:
                    dx_ND = dx_ND.addmm_(du, a) if ctx.own else torch.addmm(dx_ND, du, a)
                dx = dx_ND.view(x.shape)
        return dx, da, None, None, None, None


class _Up(torch.autograd.Function):
    """h, u, B -> h + s z B^T."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, u: Tensor, weight: Tensor, choice: Choice, own: bool) -> Tensor:
        with _exact(h):
            own_NR = _pick(u, choice)
            key_BRK, p_BTK = _attention(own_NR, choice)
            z = _spread(_sum(own_NR, key_BRK, p_BTK, choice), choice)
            h_ND = h.reshape(-1, h.shape[-1])
            b = _b(weight, choice, h.dtype)
            if own:
                h_ND.addmm_(z, b.t(), alpha=choice.at.scaling)
                ctx.mark_dirty(h)
                out = h
            else:
                out = torch.addmm(h_ND, z, b.t(), alpha=choice.at.scaling).view(h.shape)
        ctx.save_for_backward(own_NR, weight)
        ctx.choice = choice
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        own_NR, weight = ctx.saved_tensors
        choice: Choice = ctx.choice
        g_ND, du, db = g.reshape(-1, g.shape[-1]), None, None
        with _exact(g):
            key_BRK, p_BTK = _attention(own_NR, choice)
            if ctx.needs_input_grad[2]:
                z = _spread(_sum(own_NR, key_BRK, p_BTK, choice), choice)
                db = (z.t() @ g_ND).t()[:, : weight.shape[1]]  # z^T g, not g^T z: a GEMM is fast on wide rows
                db = torch.mul(db, choice.at.scaling, out=db.new_empty(db.shape)).to(weight.dtype)
                if db.shape[1] < weight.shape[1]:
                    db = nn.functional.pad(db, (0, weight.shape[1] - db.shape[1]))
            if ctx.needs_input_grad[1]:
                b = _b(weight, choice, g.dtype).t()
                dz_NR = g_ND @ torch.mul(b, choice.at.scaling, out=b.new_empty(b.shape)).t()
                if choice.routing is not None and not choice.at.shared_b:
                    dz_NR = _pick(dz_NR, choice)
                du = _place(_attention_backward(dz_NR, own_NR, key_BRK, p_BTK, choice), choice)
        return g, du, db, None, None


def _attention(own_NR: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """The keys (B,R,K), laid out so that every GEMM below is wide, and the weight (B,T,K) of each for each token."""
    if not choice.attends:
        return own_NR, own_NR
    at, routing = choice.at, choice.routing
    assert routing is not None
    bias_BTK = routing.attention_bias(own_NR.dtype)
    own_BTR = own_NR.view(*bias_BTK.shape[:2], at.r)
    key_BKR = own_NR.index_select(0, routing.key_rows()).view(len(bias_BTK), -1, at.r)
    key_BRK = key_BKR.transpose(1, 2).contiguous()
    scale = at.logit_scale * at.scaling  # own is unscaled here
    return key_BRK, torch.baddbmm(bias_BTK, own_BTR, key_BRK, alpha=scale).softmax(-1)


def _sum(own_NR: Tensor, key_BRK: Tensor, p_BTK: Tensor, choice: Choice) -> Tensor:
    """z = u_own + lambda attention."""
    if not choice.attends:
        return own_NR
    own_BTR = own_NR.view(*p_BTK.shape[:2], -1)
    key_BQR, p_BTQ = key_BRK[..., : choice.keys].transpose(1, 2), p_BTK[..., : choice.keys]
    return torch.baddbmm(own_BTR, p_BTQ, key_BQR, alpha=choice.at.attention_weight).view_as(own_NR)


def _attention_backward(dz_NR: Tensor, own_NR: Tensor, key_BRK: Tensor, p_BTK: Tensor, choice: Choice) -> Tensor:
    """dz -> the gradient of u_own, as a query, as a summand, and as a key."""
    if not choice.attends:
        return dz_NR
    at, routing, Q = choice.at, choice.routing, choice.keys
    assert routing is not None
    scale = at.logit_scale * at.scaling * at.attention_weight
    own_BTR, dz_BTR = (tensor.view(*p_BTK.shape[:2], at.r) for tensor in (own_NR, dz_NR))
    dlogits_BTK = torch._softmax_backward_data(torch.bmm(dz_BTR, key_BRK), p_BTK, -1, p_BTK.dtype)
    down_NR = torch.baddbmm(dz_BTR, dlogits_BTK, key_BRK.transpose(1, 2), alpha=scale).view_as(own_NR)
    dkey_BRQ = torch.baddbmm(
        torch.bmm(own_BTR.transpose(1, 2), dlogits_BTK[..., :Q]), dz_BTR.transpose(1, 2), p_BTK[..., :Q],
        beta=scale, alpha=at.attention_weight,
    )  # fmt: skip
    return down_NR.index_add_(0, routing.key_rows(padded=False), dkey_BRQ.transpose(1, 2).contiguous().view(-1, at.r))


def _pick(wide: Tensor, choice: Choice) -> Tensor:
    """(N, blocks*r) -> (N,r): every token's own block."""
    if choice.routing is None:
        return wide
    return wide.view(-1, choice.at.r).index_select(0, choice.routing.block_rows(choice.at.modalities))


def _place(own_NR: Tensor, choice: Choice) -> Tensor:
    """(N,r) -> (N, blocks*r): into every token's own block, zeros elsewhere."""
    if choice.routing is None:
        return own_NR
    wide = own_NR.new_zeros(len(own_NR) * choice.blocks, choice.at.r)
    return wide.index_copy_(0, choice.routing.block_rows(choice.at.modalities), own_NR).view(len(own_NR), -1)


def _spread(z_NR: Tensor, choice: Choice) -> Tensor:
    """z as B reads it: placed in its block where every modality has a B of its own."""
    return z_NR if choice.at.shared_b else _place(z_NR, choice)


def _b(weight: Tensor, choice: Choice, dtype: torch.dtype) -> Tensor:
    """B as wide as `_spread` makes z."""
    if choice.at.shared_b or choice.routing is None:
        return weight[:, : choice.at.r].to(dtype)
    return nn.functional.pad(weight, (0, choice.at.r)).to(dtype)


def _exact(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, where it is on: everything here has x's dtype already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
