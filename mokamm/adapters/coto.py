"""CoTo, and stochastic depth as its control: blocks whose adapters sit out a whole training step.

    p(t) = min(1, p0 + (1 - p0) t / (share T))     CoTo, share 0.75 (Zhuang et al., 2025, arXiv 2506.05713)
    p(t) = p                                       stochastic depth (Huang et al., 2016, arXiv 1603.09382)

    for t in range(T):
        with coto.step(t):                         draws; after it none sits out
            loss = coto.attached(model(batch))     for each micro batch
            loss.backward()
            optimizer.step()

In step t every transformer block's adapters act together with probability p(t), at least one block's of all; nothing is
rescaled by 1/p. Adapters that sit out skip their matmuls, forward and backward, and their parameters get gradients of
zero, not none: so moments decay as in a step whose gradient happens to be zero, and plain PyTorch, DDP and all ZeRO stages
compute the same. Evaluation and validation lie outside of `step` and see every adapter; what is saved holds all of them at
any time, since sitting out is no state of a weight. Nor is it PEFT's flag of what is disabled: that stays the user's, and
`disable_adapter()` within a step does not end the draw.

The draw is a function of (seed, step) alone: that pair is the generator's whole state, a checkpoint holds both, and the
draws of a resumed run and of all ranks are equal by construction. Within a step nothing is drawn again, so accumulation
and recomputed activations see what the forward pass saw. Cost: a few flags a step, and a gradient of zeros for each
parameter that sits out, for which ZeRO-3 makes it whole.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mokamm.adapters.peft_bridge import BaseTunerLayer, let_act
from mokamm.adapters.targets import tuner_layers
from mokamm.routing import AdapterError

MEAN_SHARE = 0.625  # of CoTo's defaults: 1 - share (1 - p0) / 2; stochastic depth's probability where none is given


def rising(step: int, total_steps: int, p0: float = 0.0, share: float = 0.75) -> float:
    """CoTo's p(t) at the step numbered from 0; 1 where there are no steps to rise in."""
    rise = share * total_steps
    return min(1.0, p0 + (1.0 - p0) * step / rise) if rise else 1.0


def constant(step: int, p: float = MEAN_SHARE) -> float:
    return p


def blocks_of(llm: nn.Module) -> dict[str, list[BaseTunerLayer]]:
    """Adapted modules by their transformer block, whose name ends at the first number: `model.layers.3`.

    Those outside of any block form a group of their own, named "".
    """
    blocks: dict[str, list[BaseTunerLayer]] = {}
    for name, layer in tuner_layers(llm).items():
        block = re.match(r"(.*?\.)?\d+(?=\.)", name)
        blocks.setdefault(block[0] if block else "", []).append(layer)
    return blocks


class Coto:
    """Which adapters act in which step.

    Args:
        llm: a model with adapters of any PEFT method.
        probability: p of a step; None: all act always, and `step` and `attached` do nothing.
        seed: of the draws.

    Raises:
        AdapterError: the model has no adapter that could sit out.
    """

    def __init__(self, llm: nn.Module, probability: Callable[[int], float] | None, seed: int = 0) -> None:
        self.probability, self.seed = probability, seed
        self.blocks = blocks_of(llm) if probability else {}
        self.idle: list[nn.Parameter] = []  # what sits out in the current step
        if probability and not self.blocks:
            raise AdapterError("CoTo lets adapters sit out, and this model has none: choose a method that adds some.")

    @classmethod
    def of(cls, llm: nn.Module, options: Mapping[str, Any], total_steps: int, seed: int) -> Coto:
        """options: the config's adapter section; `coto` {p0, share}, `stochastic_depth` {p}, or neither."""
        probability: Callable[[int], float] | None = None
        if options.get("coto") is not None:
            probability = partial(rising, total_steps=total_steps, **options["coto"])
        elif options.get("stochastic_depth") is not None:
            probability = partial(constant, **options["stochastic_depth"])
        return cls(llm, probability, seed)

    def active(self, step: int) -> list[bool]:
        """Which blocks act in a step, in the order of `blocks`."""
        assert self.probability is not None
        generator, p = random.Random(f"coto {self.seed} {step}"), self.probability(step)
        drawn = [generator.random() < p for _ in self.blocks]
        if not any(drawn):
            drawn[generator.randrange(len(drawn))] = True
        return drawn

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Within it the blocks that were not drawn sit out: forward, backward and update of one optimizer step."""
        try:
            if self.blocks:
                self._let_act(self.active(step))
            yield
        finally:
            self._let_act([True] * len(self.blocks))

    def attached(self, loss: Tensor) -> Tensor:
        """The loss as it is, whose gradient is zero (not none) for every parameter that sits out.

        Under ZeRO-3 they must be whole from here to the end of the backward pass, which no module of theirs brings about.
        """
        return ZeroGradients.apply(loss, *self.idle) if self.idle else loss

    def _let_act(self, active: list[bool]) -> None:
        self.idle = []
        for layers, acts in zip(self.blocks.values(), active, strict=True):
            for layer in layers:
                let_act(layer, acts)
                if not acts:
                    self.idle += [p for p in cast(nn.Module, layer).parameters() if p.requires_grad]


class ZeroGradients(torch.autograd.Function):
    """loss, parameters -> the loss; backward: zeros for the parameters, without a matmul."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: nn.Parameter) -> Tensor:  # type: ignore[override]
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return grads[0], *zeros
