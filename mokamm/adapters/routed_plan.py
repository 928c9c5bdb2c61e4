"""The routed layer in the rank space, forward and backward by hand: what `routed_fast.py` wraps into derivatives.

    u (N, L*(M+1)*r) --pick--> own (L*N,r) --attention--> key (L*B,R,K), p (L*B,T,K) --sum--> z = own + lambda p key
                                  ^                                                            |
    du  <----------place--------- down  <-------------------attention_backward---------------- dz

L layers that read the same input are one batch of L*B samples. A is padded by a block of zeros, the path of padding
tokens, so that picking each token's block is one gather of rows without any mask. Keys get one more column, a sink that
takes all the weight of tokens without attention and is left out of the sum. So the number of operators depends on
nothing, and none waits for the device.

Shape legend: N = B*T, B batch, T tokens, R rank, M modalities, Q key tokens, K columns (Q, the sink, and padding), L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    by_keys: bool = False  # the plain path alone divides by sqrt(number of keys)


@dataclass(frozen=True, eq=False)
class Plan:
    """A batch's routing as `layers` layers of the same settings read it; without rows, all is text."""

    at: Settings
    layers: int = 1
    rows: Tensor | None = None  # (L*N,) the block of each layer and token
    shape: tuple[int, int, int] = (0, 0, 0)  # L*B, T, r
    key_rows: Tensor | None = None  # (L*B*K,), none where nothing attends
    own_key_rows: Tensor | None = None  # (L*B*Q,)
    bias: Tensor | None = None  # (L*B,T,K)
    keys: int = 0  # Q

    @property
    def blocks(self) -> int:
        """Blocks of r columns that a layer has in u."""
        return 1 if self.rows is None else self.at.modalities + 1

    @property
    def rows_of_a(self) -> int:
        """Rows of A that are read: all, or those of text."""
        return self.at.r if self.rows is None else self.at.r * self.at.modalities


def plan_of(at: Settings, routing: Routing | None, dtype: torch.dtype, layers: int = 1) -> Plan:
    """Made once a batch, for all layers alike."""
    if routing is None:
        return Plan(at, layers)

    def make() -> Plan:
        B, T = routing.shape or (0, 0)
        rows, shape = routing.block_rows(at.modalities, layers), (layers * B, T, at.r)
        if not at.attention_weight or at.modalities < 2:
            return Plan(at, layers, rows, shape)
        whole = routing.tiled(layers)
        assert whole.key_index is not None
        keys = whole.key_rows(), whole.key_rows(padded=False)
        return Plan(at, layers, rows, shape, *keys, whole.attention_bias(dtype), whole.key_index.shape[1])

    return routing._once(("plan", at, dtype, layers), make)


def pick(wide: Tensor, plan: Plan) -> Tensor:
    """u -> own: every token's own block."""
    if plan.rows is not None:
        return wide.view(-1, plan.at.r).index_select(0, plan.rows)
    return wide if plan.layers == 1 else wide.view(-1, plan.layers, plan.at.r).transpose(0, 1).reshape(-1, plan.at.r)


def place(own: Tensor, plan: Plan) -> Tensor:
    """Each row of own in its block, zeros elsewhere."""
    r, layers = plan.at.r, plan.layers
    if plan.rows is None:
        return own if layers == 1 else own.view(layers, -1, r).transpose(0, 1).reshape(-1, layers * r)
    wide = own.new_zeros(len(own) * plan.blocks, r).index_copy_(0, plan.rows, own)
    return wide.view(-1, layers * plan.blocks * r)


def attention(own: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The keys (L*B,R,K), laid out so that every GEMM below is wide, and each token's weights (L*B,T,K) of them."""
    if plan.bias is None or plan.key_rows is None:
        return own, own
    at = plan.at
    key_BKR = own.index_select(0, plan.key_rows).view(plan.shape[0], -1, at.r)
    key_BRK = key_BKR.transpose(1, 2).contiguous()
    logits_BTK = torch.baddbmm(plan.bias, own.view(plan.shape), key_BRK, alpha=at.logit_scale * at.scaling)
    return key_BRK, logits_BTK.softmax(-1)


def attended(own: Tensor, key_BRK: Tensor, p_BTK: Tensor, plan: Plan) -> Tensor:
    """z = own + lambda p key."""
    if plan.bias is None:
        return own
    Q = plan.keys
    z_BTR = torch.baddbmm(
        own.view(plan.shape), p_BTK[..., :Q], key_BRK[..., :Q].transpose(1, 2), alpha=plan.at.attention_weight
    )
    return z_BTR.view(-1, plan.at.r)


def attention_backward(dz: Tensor, own: Tensor, key_BRK: Tensor, p_BTK: Tensor, plan: Plan) -> Tensor:
    """dz -> the gradient of own as a summand, as a query and as a key."""
    if plan.bias is None or plan.own_key_rows is None:
        return dz
    at, Q = plan.at, plan.keys
    scale = at.logit_scale * at.scaling * at.attention_weight
    own_BTR, dz_BTR = own.view(plan.shape), dz.view(plan.shape)
    dlogits_BTK = torch._softmax_backward_data(torch.bmm(dz_BTR, key_BRK), p_BTK, -1, p_BTK.dtype)
    down = torch.baddbmm(dz_BTR, dlogits_BTK, key_BRK.transpose(1, 2), alpha=scale).view(-1, at.r)
    dkey_BRQ = torch.baddbmm(
        torch.bmm(own_BTR.transpose(1, 2), dlogits_BTK[..., :Q]), dz_BTR.transpose(1, 2), p_BTK[..., :Q],
        beta=scale, alpha=at.attention_weight,
    )  # fmt: skip
    return down.index_add_(0, plan.own_key_rows, dkey_BRQ.transpose(1, 2).contiguous().view(-1, at.r))


def stacked_a(weights: tuple[Tensor, ...], plan: Plan, dtype: torch.dtype) -> Tensor:
    """(L*blocks*r, D): the A of every layer, each with its block of zeros."""
    if plan.rows is None:
        parts = [weight[: plan.at.r] for weight in weights]
    elif len(weights) == 1:
        parts = [nn.functional.pad(weights[0], (0, 0, 0, plan.at.r))]
    else:
        zeros = weights[0].new_zeros(plan.at.r, weights[0].shape[1])
        parts = [part for weight in weights for part in (weight, zeros)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def split_a(da: Tensor, weights: tuple[Tensor, ...], plan: Plan) -> list[Tensor]:
    """The gradient of `stacked_a` as those of the layers' A."""
    parts = [part[: len(weight)] for part, weight in zip(da.chunk(plan.layers), weights, strict=True)]
    if plan.rows_of_a < len(weights[0]):
        parts = [nn.functional.pad(p, (0, 0, 0, len(w) - len(p))) for p, w in zip(parts, weights, strict=True)]
    return [part.to(weight.dtype) for part, weight in zip(parts, weights, strict=True)]


def add_update(h_ND: Tensor, z: Tensor, b: Tensor, plan: Plan, in_place: bool) -> Tensor:
    """h + s z B^T, of one layer."""
    z = _spread(z, plan).to(h_ND.dtype)
    b = _b(b, plan, h_ND.dtype).t()
    scale = plan.at.scaling
    return h_ND.addmm_(z, b, alpha=scale) if in_place else torch.addmm(h_ND, z, b, alpha=scale)


def update_backward_z(g_ND: Tensor, b: Tensor, plan: Plan) -> Tensor:
    """dz (N,r) of one layer."""
    b = _b(b, plan, g_ND.dtype).t()
    dz = g_ND @ torch.mul(b, plan.at.scaling, out=b.new_empty(b.shape)).t()  # b laid out anew: four times as fast here
    return dz if plan.at.shared_b or plan.rows is None else pick(dz, plan)


def update_backward_b(g_ND: Tensor, z: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """dB of one layer."""
    db = (_spread(z, plan).to(g_ND.dtype).t() @ g_ND).t()[:, : weight.shape[1]]  # z^T g: a GEMM is fast on wide rows
    db = torch.mul(db, plan.at.scaling, out=db.new_empty(db.shape)).to(weight.dtype)
    return db if db.shape == weight.shape else nn.functional.pad(db, (0, weight.shape[1] - db.shape[1]))


def _spread(z: Tensor, plan: Plan) -> Tensor:
    """z as B reads it: placed in its block where every modality has a B of its own."""
    return z if plan.at.shared_b else place(z, plan)


def _b(weight: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """B as wide as `_spread` makes z."""
    if plan.at.shared_b or plan.rows is None:
        return weight[:, : plan.at.r].to(dtype)
    return nn.functional.pad(weight, (0, plan.at.r)).to(dtype)
