"""What a tuner of routed layers shares with all of them: the routing of the current batch, and what a forward is in it.

It is held until the next one is set, because gradient checkpointing runs layers again during the backward pass. Hooks on
the LLM tell a prompt from the tokens that go on from its cache.

Shape legend: B batch, T tokens, D width.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mokamm.routing import AdapterError, Routing

ONE_BY_ONE = (
    "After a prompt, tokens come one by one: a chat prefills each turn anew instead of going on from a cache, and assisted "
    "or prompt-lookup decoding (assistant_model, prompt_lookup_num_tokens), which checks several at once, does not work."
)


class RoutingContext:
    """The routing of the current batch, shared by a tuner and all of its layers.

    It watches the LLM, not the layers: a forward that goes on from the cache of a prompt is not the prompt, whatever its
    shape. One more token of each row is text there, several are refused. Compiled code asks no cache, only for shapes.
    """

    def __init__(self) -> None:
        self.routing = None
        self.prompt: tuple[Routing, int] | None = None  # the last prompt's, and the length of the cache that it found
        self.going_on: dict[int, int] = {}  # by thread, while its forward goes on from a prompt: tokens of each row
        self.latents: tuple[Routing, int, Routing] | None = None  # of `_of_latents`: for what, and what it gave

    @property
    def routing(self) -> Routing | None:
        return self._routing

    @routing.setter
    def routing(self, routing: Routing | None) -> None:
        self._routing = routing
        ids = None if routing is None else routing.modality_ids
        self.steps_are_text = ids is None or ids.shape[1] > 1  # of an input (B,1,D): the next token of each row

    def watch(self, llm: nn.Module) -> None:
        """From now on, and once whatever is added to it later."""
        self.leave(llm)
        llm.register_forward_pre_hook(self._begin, with_kwargs=True)
        llm.register_forward_hook(self._end, always_call=True)

    def leave(self, llm: nn.Module) -> None:
        """Take the hooks off it."""
        take_off(self, llm)

    def _begin(self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell a prompt from what goes on from its cache: this is text, or, of several tokens, refused by the layers."""
        routing, tokens = self._routing, _tokens(args, kwargs)
        if routing is None or routing.modality_ids is None or tokens is None:
            return
        T, eager = routing.modality_ids.shape[1], not torch.compiler.is_compiling()
        if tokens == 1 and T > 1:  # the common step asks no cache, which may be on a device
            self.going_on[threading.get_ident()] = tokens
        elif eager:
            length = _length(args, kwargs)
            if self.prompt is not None and self.prompt[0] is routing and length >= self.prompt[1] + T:
                self.going_on[threading.get_ident()] = tokens
            else:
                self.prompt = routing, length

    def _end(self, *_: Any) -> None:
        self.going_on.pop(threading.get_ident(), None)

    def look_up(self, x: Tensor) -> Routing | None:
        """The routing for a layer's input (B,T,D), some LLMs' (B*T,D) or latents (B,1,S,D); None where all of it is text.

        Single-token steps after a prefill are text. Rows repeated for beams are understood while no gradient is
        recorded (as in `generate`); with gradients a batch of another size is a mistake.

        Raises:
            AdapterError: several tokens without a routing, with one of another shape, or going on from a prompt's cache.
        """
        routing = self._routing
        if routing is not None:
            ids = routing.modality_ids
            if ids is None:
                return None
            same = x.dim() == 3 and x.shape[:2] == ids.shape and x.device == ids.device
            if same and not self.going_on:
                return routing  # as nearly always
            if x.dim() == 3 and x.shape[1] == 1 and ids.shape[1] > 1:
                return None
            tokens = self.going_on.get(threading.get_ident(), 0)
            if x.dim() == 4 and x.shape[1] == 1 and x.shape[2] > 1 and tokens <= 1:
                found = self._of_latents(x, routing)
                if found is not None:
                    return found
            elif tokens:
                if tokens == 1:
                    return None
                raise AdapterError(
                    f"The routing is that of a prompt, (B, T) = {routing.shape}, but a routed layer got several tokens "
                    f"(input {tuple(x.shape)}) that go on from its cache. {ONE_BY_ONE}"
                )
        if routing is None:
            if x.shape[-2] == 1:
                return None
            raise AdapterError(
                f"A routed layer got several tokens (input {tuple(x.shape)}) but no routing. Call "
                "model.base_model.set_routing(Routing(modality_ids, key_mask)) before the forward, or "
                "set_routing(Routing.text_only()) to say that all of it is text."
            )
        B, T = routing.shape or (0, 0)
        tokens = x.shape[:-1].numel()
        if T > 1 and x.dim() == 2 and tokens % B == 0 and tokens < B * T:
            return None
        rows, rest = divmod(tokens, T)
        fits = rest == 0 and (x.dim() == 2 or (x.dim() == 3 and x.shape[1] == T))
        if fits and (rows == B or (rows % B == 0 and rows > 0 and not torch.is_grad_enabled())):
            return routing.view(rows, x.device)
        raise AdapterError(
            f"The routing is for (B, T) = ({B}, {T}), but a routed layer got an input of shape {tuple(x.shape)}. Set "
            "the routing of this very batch, padding included, before each forward (rows repeated for beams are "
            f"understood, without gradients). {ONE_BY_ONE}"
        )

    def _of_latents(self, x: Tensor, routing: Routing) -> Routing | None:
        """The routing for the latents of keys and values (B,1,S,D), as DeepSeek's attention has them; None: it fits none.

        They are what the cache holds, and are read whole in every step: the prompt, then text.
        """
        B, T = routing.shape or (0, 0)
        rows, more = x.shape[0], x.shape[2] - T
        begun = self.prompt is not None and self.prompt[0] is routing and self.prompt[1] == 0
        if more < 0 or (more and not begun) or rows % B or (rows != B and torch.is_grad_enabled()):
            return None
        routing = routing.view(rows, x.device)
        if more == 0:
            return routing
        if self.latents is None or self.latents[0] is not routing or self.latents[1] != more:
            self.latents = routing, more, routing.before_text(more)
        return self.latents[2]

    def checkpoint_contexts(self) -> tuple[Restored, Restored]:
        """`context_fn` for torch's non-reentrant checkpoint: recompute under the routing of this forward."""
        return Restored(self, self.routing), Restored(self, self.routing)


class Restored:
    """Within it, a context has the given routing again; may be entered more than once."""

    def __init__(self, context: RoutingContext, routing: Routing | None) -> None:
        self.context, self.routing = context, routing
        self.before: list[Routing | None] = []

    def __enter__(self) -> None:
        self.before.append(self.context.routing)
        self.context.routing = self.routing

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.context.routing = self.before.pop()


def take_off(owner: Any, module: nn.Module) -> None:
    """Removes the forward hooks of a module that are methods of `owner`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            for kind in ("pre_hooks_with_kwargs", "hooks_with_kwargs", "hooks_always_called"):
                getattr(module, f"_forward_{kind}").pop(key, None)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many tokens of each row an LLM is called with, by its embeddings or ids; None where neither is found."""
    for given in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args[:1]):
        if isinstance(given, Tensor) and given.dim() > 1:
            return given.shape[1]
    return None


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens in the KV cache that an LLM is called with, known by its kind: transformers has renamed the argument.

    A static one on a device is waited for: at prompts, and after one of a single token.
    """
    cache = next((given for given in (*kwargs.values(), *args) if hasattr(given, "get_seq_length")), None)
    try:
        return 0 if cache is None else int(cache.get_seq_length())
    except ValueError:  # of linear attentions alone: their states have no length
        return 0
