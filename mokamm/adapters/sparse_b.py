"""A B of which only the entries of a mask are parameters: gradient, optimizer and file shrink with them.

    values (K,)    the trained entries, row by row           positions (K,)    where they stand in B, from the packed mask
    frozen (L,)    entries outside the mask that an adapter to go on from had: they act, and never train

    forward    B = zeros; B[positions] = values; B[frozen positions] = frozen; y = z B^T
    backward   B is built once more; dz = dy B; dvalues = (dy^T z)[positions]

Only z and the K values are kept for the backward pass, never a dense B. The two products are dense: at ten per cent of
entries and rank 32 that is faster than sparse kernels on every device, and B exists for one layer at a time. Nothing
waits for the device. In the state dict: values, mask (a bit an entry), shape, and where used frozen_values, frozen_mask.

Shape legend: R rank (columns of B), D out_features, K kept entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mokamm.adapters.masks import count, pack, tidy, unpack
from mokamm.adapters.standing_in import under_transform
from mokamm.routing import AdapterError


class SparseB(nn.Module):
    """z (..., R) -> (..., D). Before `set_mask` no entry is kept: it adds nothing and has nothing to train.

    Args:
        in_features, out_features: R and D.
        device: of all tensors; on the meta device nothing is allocated.
    """

    values: Tensor | None
    mask: Tensor | None
    frozen_mask: Tensor | None
    frozen_values: Tensor | None
    positions: Tensor | None
    frozen_positions: Tensor | None

    def __init__(self, in_features: int, out_features: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.values = nn.Parameter(torch.empty(0, device=device))
        self.register_buffer("shape", torch.tensor([out_features, in_features], dtype=torch.int32, device=device))
        self.register_buffer("mask", None)
        self.register_buffer("positions", None, persistent=False)
        self.clear_frozen()

    @property
    def size(self) -> tuple[int, int]:
        """(D, R)"""
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        return next((t.device for t in (self.values, self.mask) if t is not None), torch.device("cpu"))

    @property
    def entries(self) -> int:
        return self.out_features * self.in_features

    def extra_repr(self) -> str:
        kept = 0 if self.values is None else self.values.numel()
        return f"{self.in_features}, {self.out_features}, kept={kept} of {self.entries}"

    def forward(self, z: Tensor) -> Tensor:
        if self.positions is None and self.frozen_positions is None:
            return z.new_zeros(*z.shape[:-1], self.out_features)
        if under_transform():
            return F.linear(z, self._dense(z.dtype, z.device))
        return _Product.apply(z, self.values, self.positions, self.frozen_values, self.frozen_positions, self.size)  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        """B (D, R), detached."""
        like = next(t for t in (self.values, self.frozen_values, torch.empty(0)) if t is not None)
        return self._dense(like.dtype, like.device).detach()

    def _dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _dense(self.values, self.positions, self.frozen_values, self.frozen_positions, self.size, dtype, device)

    # -- which entries --

    @torch.no_grad()
    def set_mask(self, bits: Tensor, name: str = "B", device: torch.device | None = None) -> None:
        """Keep these entries (packed, row by row); their values begin at 0. A layer without any has no parameter."""
        old, device = self.values, device or self.device
        kept = count(tidy(name, bits, self.size))
        like = torch.empty(0, device=device) if old is None else old
        requires = old is None or old.requires_grad
        self.mask, self.positions = bits.to(device), self._positions(bits, kept, device)
        self.values = nn.Parameter(like.new_zeros(kept, device=device), requires_grad=requires) if kept else None

    @torch.no_grad()
    def set_frozen(self, bits: Tensor, values: Tensor, name: str = "B") -> None:
        """Entries that act and never train."""
        device = self.device
        if count(tidy(name, bits, self.size)) != values.numel():
            raise AdapterError(f"{name}: its mask of frozen entries and their number disagree; the file is damaged.")
        self.frozen_mask, self.frozen_values = bits.to(device), values.to(device)
        self.frozen_positions = self._positions(bits, values.numel(), device)

    def clear_frozen(self) -> None:
        for part in ("frozen_mask", "frozen_values"):
            self.register_buffer(part, None)
        self.register_buffer("frozen_positions", None, persistent=False)

    @torch.no_grad()
    def start(self, B: Tensor) -> None:
        """Begin from a dense B (D, R): its entries under the mask train on, its others stay as they are."""
        if self.mask is None or tuple(B.shape) != self.size:
            raise AdapterError(f"B is {tuple(B.shape)}, expected {self.size} and a mask that is set.")
        flat = B.flatten()
        kept = unpack(self.mask, self.entries).to(flat.device)
        if self.values is not None:
            self.values.copy_(flat[kept])
        outside = ~kept & (flat != 0)
        self.clear_frozen()
        if bool(outside.any()):
            self.set_frozen(pack(outside), flat[outside])

    def _positions(self, bits: Tensor, kept: int, device: torch.device) -> Tensor | None:
        if not kept:
            return None
        if device.type == "meta":
            return torch.empty(kept, dtype=torch.int32, device=device)
        return unpack(bits.to(device), self.entries).nonzero().flatten().to(torch.int32)


def dense_weight(module: nn.Module) -> Tensor:
    """The detached matrix of a factor: B (D, R) of a SparseB, or the weight of an nn.Linear."""
    if isinstance(module, SparseB):
        return module.dense()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _dense(
    values: Tensor | None,
    positions: Tensor | None,
    frozen_values: Tensor | None,
    frozen_positions: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    B = torch.zeros(shape[0] * shape[1], dtype=dtype, device=device)
    add = Tensor.index_add if under_transform() else Tensor.index_add_  # vmap over the entries needs another B
    for index, entries in ((positions, values), (frozen_positions, frozen_values)):
        if index is not None and entries is not None:
            B = add(B, 0, index, entries.to(dtype))
    return B.view(shape)


class _Product(torch.autograd.Function):
    """z B^T, with B built anew in each direction."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, *given: Any) -> Tensor:
        values, positions, frozen_values, frozen_positions, shape = given
        ctx.shape = shape
        ctx.save_for_backward(z, values, positions, frozen_values, frozen_positions)
        B = _dense(values, positions, frozen_values, frozen_positions, shape, z.dtype, z.device)
        return F.linear(z, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, values, positions, frozen_values, frozen_positions = ctx.saved_tensors
        dz = dvalues = None
        if ctx.needs_input_grad[0]:
            B = _dense(values, positions, frozen_values, frozen_positions, ctx.shape, dy.dtype, dy.device)
            dz = (dy @ B).to(z.dtype)
        if ctx.needs_input_grad[1] and values is not None:
            dB = dy.reshape(-1, dy.shape[-1]).T @ z.reshape(-1, z.shape[-1]).to(dy.dtype)
            dvalues = dB.reshape(-1).index_select(0, positions).to(values.dtype)
        return dz, dvalues, None, None, None, None
