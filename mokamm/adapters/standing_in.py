"""When a hand-written path may stand in for plain modules and operators: nothing looks on that would miss them."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def is_bare(module: nn.Module | None, *kinds: type[nn.Module], globally: bool = True) -> bool:
    """Whether a module is of one of these very classes, and calling it is calling its forward and nothing else.

    globally: hooks on all modules, which counters and profilers set, count too.
    """
    if module is None or type(module) not in kinds:
        return False
    own = module.__dict__  # asked by every layer in every step: attributes would take 4 % of a decoding step
    if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    return not (own["_backward_hooks"] or own["_backward_pre_hooks"] or (globally and _has_any_global_hook()))


def under_transform() -> bool:
    """Whether a tracer, torch.func or forward-mode differentiation wants plain operators. Compilers ask for themselves."""
    if torch.compiler.is_compiling():
        return False
    traced = torch._C._get_tracing_state() is not None
    return traced or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
