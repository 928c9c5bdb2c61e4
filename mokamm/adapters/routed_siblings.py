"""Layers that read the same input and are computed together: q, k and v of an attention; gate and up of an MLP.

The first of them that is called computes all of them and keeps the others' outputs; these, called with the very same
tensor, take theirs. A guess by names can only cost time: a sibling that gets another input computes its own output.
Nothing outlives the block: what has been taken, or is for another input, is let go.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mokamm.routing import Routing

NAMES = ({"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
READ_ANOTHER = ("cross", "encoder_attn")  # in the path of an attention whose keys come from elsewhere


class Siblings:
    """Some layers, and the outputs that wait for those not called yet."""

    def __init__(self, layers: tuple[nn.Module, ...] = ()) -> None:
        self.layers = layers
        self.outputs: dict[nn.Module, Tensor] = {}
        self.waits_for: Any = None

    def others(self, layer: nn.Module) -> list[Any]:
        return [other for other in self.layers if other is not layer]

    def keep(self, outputs: dict[nn.Module, Tensor], x: Tensor, routing: Routing | None) -> None:
        """Until their layers are called with this x."""
        self.clear()
        if outputs:
            self.outputs, self.waits_for = outputs, (x, x._version, routing, torch.is_grad_enabled())

    def take(self, layer: nn.Module, x: Tensor, routing: Routing | None) -> Tensor | None:
        """The output that was computed for this layer and this x, once."""
        if not self.outputs:
            return None
        known, version, under, recorded = self.waits_for
        same = known is x and version == x._version and under is routing and recorded == torch.is_grad_enabled()
        output = self.outputs.pop(layer, None) if same else None
        if output is None or not self.outputs:
            self.clear()
        return output

    def clear(self) -> None:
        self.outputs, self.waits_for = {}, None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "outputs": {}, "waits_for": None}


def find_siblings(model: nn.Module, kind: type[nn.Module]) -> None:
    """Gives every layer of a kind its siblings, by the names of the children of one module."""
    for path, parent in model.named_modules():
        if any(part in path.lower() for part in READ_ANOTHER):
            continue
        children = dict(parent.named_children())
        for names in NAMES:
            found = tuple(child for name, child in children.items() if name in names and isinstance(child, kind))
            shared = Siblings(found) if len(found) > 1 else None
            for child in found if shared else ():
                child.siblings = shared  # type: ignore[assignment]
