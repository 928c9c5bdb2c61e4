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

from mokamm.adapters.routed_context import take_off
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
        self.children: dict[str, nn.Module | None] | None = None  # of the parent while it runs
        self.packing: Any = None  # what is done to saved tensors where the parent began
        self.waiting: Waiting | None = None

    def watch(self, parent: nn.Module) -> None:
        """Share outputs while this module runs."""
        parent.register_forward_pre_hook(self._begin)
        parent.register_forward_hook(self._end, always_call=True)

    def leave(self, parent: nn.Module) -> None:
        """Take the hooks off it."""
        take_off(self, parent)

    def _begin(self, parent: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.children, self.packing, self.waiting = parent._modules, _packing(), None

    def _end(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.children = self.waiting = None

    def others(self, layer: nn.Module) -> list[Any]:
        """The siblings of a layer, while their parent runs; none in a checkpoint within it, which runs without it again."""
        if (children := self.children) is None or self.packing != _packing():
            return []
        found = (children.get(name) for name in self.names)
        alike = (other for other in found if other is not layer and type(other) is type(layer))  # no wrapper of one
        return [other for other in alike if getattr(other, "siblings", None) is self]

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
        return {"names": self.names, "children": None, "packing": None, "waiting": None}


def _packing() -> Any:
    """The innermost hooks on saved tensors, which checkpoints set."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


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
                siblings.leave(parent)
            shared = Siblings(tuple(found))
            shared.watch(parent)
            for child in found.values():
                child.siblings = shared  # type: ignore[assignment]


def part_siblings(model: nn.Module) -> None:
    """Undoes `find_siblings`: no hook is left in the model."""
    for parent in model.modules():
        for hook in [*parent._forward_pre_hooks.values()]:
            if isinstance(siblings := getattr(hook, "__self__", None), Siblings):
                siblings.leave(parent)
                for child in parent.children():
                    if getattr(child, "siblings", None) is siblings:
                        child.siblings = Siblings()  # type: ignore[assignment]
