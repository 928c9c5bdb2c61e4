"""Layers that read the same input and are computed together: q, k and v of an attention; gate and up of an MLP.

While their parent runs, the first of them that is called computes all of them and keeps the others' outputs; these, called
with the very same tensor, take theirs. A guess by names can only cost time: a sibling that gets another input computes its
own output. When the parent returns, or fails, nothing is left; a layer that is called by itself shares nothing, so that
weights may change, and backward run, between one call and the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mokamm.routing import Routing

NAMES = ({"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"gate_proj", "up_proj"}, {"w1", "w3"})
READ_ANOTHER = ("cross", "encoder_attn")  # in the path of an attention whose keys come from elsewhere


class Waiting(NamedTuple):
    """Outputs of layers not called yet, and what they were computed from."""

    outputs: dict[nn.Module, Tensor]
    x: Tensor
    version: int
    routing: Routing | None
    recorded: bool


class Siblings:
    """The children of one module that have these names. Threads that run it at once cost each other time alone."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        self.hooks: tuple[Any, ...] = ()
        self.children: dict[str, nn.Module | None] | None = None  # of the parent while it runs
        self.waiting: Waiting | None = None

    def watch(self, parent: nn.Module) -> None:
        """Share outputs while this module runs."""
        self.hooks = (
            parent.register_forward_pre_hook(self._begin),
            parent.register_forward_hook(self._end, always_call=True),
        )

    def dissolve(self) -> None:
        """Share nothing any more, and leave no hook behind."""
        for hook in self.hooks:
            hook.remove()
        self.names, self.hooks, self.children, self.waiting = (), (), None, None

    def _begin(self, parent: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.children, self.waiting = parent._modules, None

    def _end(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.children = self.waiting = None

    def others(self, layer: nn.Module) -> list[Any]:
        """The siblings of a layer, while their parent runs."""
        if (children := self.children) is None:
            return []
        found = (children.get(name) for name in self.names)
        return [other for other in found if other is not layer and getattr(other, "siblings", None) is self]

    def keep(self, outputs: dict[nn.Module, Tensor], x: Tensor, routing: Routing | None) -> None:
        """Until their layers are called with this x."""
        self.waiting = Waiting(outputs, x, x._version, routing, torch.is_grad_enabled()) if outputs else None

    def take(self, layer: nn.Module, x: Tensor, routing: Routing | None) -> Tensor | None:
        """The output that was computed for this layer and this x, once."""
        if (waiting := self.waiting) is None:
            return None
        outputs, known, version, under, recorded = waiting
        same = known is x and version == x._version and under is routing and recorded == torch.is_grad_enabled()
        output = outputs.pop(layer, None) if same else None
        if output is None or not outputs:
            self.waiting = None
        return output

    def clear(self) -> None:
        self.waiting = None

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "hooks": self.hooks, "children": None, "waiting": None}


def find_siblings(model: nn.Module, kind: type[nn.Module]) -> None:
    """Gives every layer of a kind its siblings, by the names of the children of one module."""
    for path, parent in list(model.named_modules()):
        if any(part in path.lower() for part in READ_ANOTHER):
            continue
        children = dict(parent.named_children())
        for names in NAMES:
            found = {name: child for name, child in children.items() if name in names and isinstance(child, kind)}
            known: set[Any] = {child.siblings for child in found.values()}
            if len(found) < 2 or (len(known) == 1 and known.pop().names == tuple(found)):
                continue
            for siblings in known:
                siblings.dissolve()
            shared = Siblings(tuple(found))
            shared.watch(parent)
            for child in found.values():
                child.siblings = shared  # type: ignore[assignment]
