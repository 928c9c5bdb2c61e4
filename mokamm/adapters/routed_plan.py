"""The routed layer in the rank space, forward and backward by hand: what `routed_fast.py` wraps into derivatives.

    u (N, L*M*r) --pick--> own (L*N,r) --attention--> key (L*B,R,K), p (L*B,T,K) --sum--> z = s (own + lambda p key)
                                                                                          |
    du  <-------place-------- down  <-------------------attention_backward--------------- dz

L layers that read the same input are one batch of L*B samples. Where a token is padding, A has a block of zeros more, its
path, so that picking each token's block is one gather of rows without any mask. Keys get one more column, a sink that
takes all the weight of tokens without attention and whose key is zero. s is a factor of the sums that make z and du.
So the number of operators depends on nothing, and none waits for the device. Views count too: for a small batch, what calls
cost is what MokA costs.

Shape legend: N = B*T, B batch, T tokens, R rank, M modalities, Q key tokens, K columns (Q, the sink, and padding), L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mokamm.routing import Routing


class Settings(NamedTuple):  # compared and hashed by every layer in every step
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
    bias: Tensor | None = None  # (L*B,T,K), none where nothing attends; nor then are the next three
    key_index: Tensor | None = None  # (L*B,R,K), positions of the keys
    own_key_index: Tensor | None = None  # (L*B,R,Q), without the sink and padding
    is_key: Tensor | None = None  # (K,), 1 at the first Q
    blocks: int = 1  # of r columns, that a layer has in u


def plan_of(at: Settings, routing: Routing | None, dtype: torch.dtype, layers: int = 1) -> Plan:
    """Made once a batch, for all layers alike."""
    if routing is None:
        return Plan(at, layers)

    def make() -> Plan:
        assert routing.modality_ids is not None
        B, T = routing.modality_ids.shape
        # without padding too on a GPU, where a power of two of columns may suit tensor cores better: not measured
        zeros = routing.may_be_padded or routing.modality_ids.device.type != "cpu"
        blocks, shape = at.modalities + zeros, (layers * B, T, at.r)
        rows = routing.block_rows(at.modalities, blocks, layers)
        if not at.attention_weight or at.modalities < 2:
            return Plan(at, layers, rows, shape, blocks=blocks)
        whole = routing.tiled(layers)
        index, is_key = whole.key_columns(dtype)
        index = index.unsqueeze(1).expand(-1, at.r, -1)
        own_index = index[..., : routing.most_keys]
        return Plan(at, layers, rows, shape, whole.attention_bias(dtype), index, own_index, is_key, blocks)

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
    if plan.bias is None or plan.key_index is None or plan.is_key is None:
        return own, own
    at, own_BTR = plan.at, own.view(plan.shape)
    key_BRK = own_BTR.transpose(1, 2).gather(2, plan.key_index).mul_(plan.is_key)
    logits_BTK = torch.baddbmm(plan.bias, own_BTR, key_BRK, alpha=at.logit_scale * at.scaling)
    return key_BRK, logits_BTK.softmax(-1)


def attended(own: Tensor, key_BRK: Tensor, p_BTK: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """z = s (own + lambda p key) of every layer."""
    s = plan.at.scaling
    if plan.bias is None:
        z = own * s
    else:
        weight = s * plan.at.attention_weight
        z = torch.baddbmm(own.view(plan.shape), p_BTK, key_BRK.transpose(1, 2), beta=s, alpha=weight)
    return z.view(plan.layers, -1, plan.at.r).unbind() if plan.layers > 1 else (z.view(-1, plan.at.r),)


def attention_backward(dz: Tensor, own: Tensor, key_BRK: Tensor, p_BTK: Tensor, plan: Plan) -> Tensor:
    """dz -> the gradient of own as a summand, as a query and as a key. dz may be changed in place."""
    if plan.own_key_index is None:
        return dz.mul_(plan.at.scaling)
    at, s = plan.at, plan.at.scaling
    weight, scale = s * at.attention_weight, s * at.attention_weight * at.logit_scale * s
    own_BRT, dz_BTR = own.view(plan.shape).transpose(1, 2), dz.view(plan.shape)
    dlogits_BTK = torch._softmax_backward_data(torch.bmm(dz_BTR, key_BRK), p_BTK, -1, p_BTK.dtype)
    down_BTR = torch.baddbmm(dz_BTR, dlogits_BTK, key_BRK.transpose(1, 2), beta=s, alpha=scale)
    dkey_BRK = torch.bmm(own_BRT, dlogits_BTK).baddbmm_(dz_BTR.transpose(1, 2), p_BTK, beta=scale, alpha=weight)
    down_BTR.transpose(1, 2).scatter_add_(2, plan.own_key_index, dkey_BRK)  # of the first Q columns
    return down_BTR.view(-1, at.r)


def stacked_a(weights: Sequence[Tensor], plan: Plan, dtype: torch.dtype) -> Tensor:
    """(L*blocks*r, D): the A of every layer, each with its block of zeros where there are such."""
    parts, r = list(weights), plan.at.r
    if plan.blocks < plan.at.modalities:
        parts = [weight[: plan.blocks * r] for weight in weights]
    elif plan.blocks > plan.at.modalities and len(weights) == 1:
        parts = [nn.functional.pad(weights[0], (0, 0, 0, r))]
    elif plan.blocks > plan.at.modalities:
        zeros = weights[0].new_zeros(r, weights[0].shape[1])
        parts = [part for weight in weights for part in (weight, zeros)]
    return as_dtype(parts[0] if len(parts) == 1 else torch.cat(parts), dtype)


def split_a(da: Tensor, weights: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The gradient of `stacked_a` as those of the layers' A."""
    parts = [da] if plan.layers == 1 else da.view(plan.layers, -1, da.shape[1]).unbind()
    if plan.blocks > plan.at.modalities:
        parts = [part[: len(weights[0])] for part in parts]
    elif plan.blocks < plan.at.modalities:
        parts = [nn.functional.pad(part, (0, 0, 0, len(weights[0]) - len(part))) for part in parts]
    return [as_dtype(part, weight.dtype) for part, weight in zip(parts, weights, strict=True)]


def add_update(h_ND: Tensor, z: Tensor, b: Tensor, plan: Plan, in_place: bool) -> Tensor:
    """h + z B^T, of one layer."""
    z, b = as_dtype(_spread(z, plan), h_ND.dtype), _b(b, plan, h_ND.dtype).t()
    return h_ND.addmm_(z, b) if in_place else torch.addmm(h_ND, z, b)


def update_backward_z(g_ND: Tensor, b: Tensor, plan: Plan) -> Tensor:
    """dz (N,r) of one layer."""
    dz = g_ND @ _b(b, plan, g_ND.dtype).t().contiguous().t()  # b laid out anew: four times as fast here
    return dz if plan.at.shared_b else pick(dz, plan)


def update_backward_b(g_ND: Tensor, z: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """dB of one layer, laid out by columns."""
    db = (as_dtype(_spread(z, plan), g_ND.dtype).t() @ g_ND).t()  # z^T g: a GEMM is fast on wide rows
    return as_dtype(db if plan.at.shared_b else _as_wide(db, weight.shape[1]), weight.dtype)


def _spread(z: Tensor, plan: Plan) -> Tensor:
    """z as B reads it: placed in its block where every modality has a B of its own."""
    return z if plan.at.shared_b else place(z, plan)


def _b(weight: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """B as wide as `_spread` makes z."""
    return as_dtype(weight if plan.at.shared_b else _as_wide(weight, plan.at.r * plan.blocks), dtype)


def _as_wide(matrix: Tensor, columns: int) -> Tensor:
    """The first of its columns, or all of them and zeros behind."""
    more = columns - matrix.shape[1]
    return nn.functional.pad(matrix, (0, more)) if more > 0 else matrix[:, :columns]


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs a call also where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
