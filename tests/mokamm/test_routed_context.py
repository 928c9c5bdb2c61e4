"""The context that routed layers ask for their batch's routing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from mokamm.adapters.routed_context import RoutingContext
from mokamm.routing import AdapterError, Routing

IDS = torch.tensor([[0, 1, 1, 0, 2, 0], [0, 0, 0, 0, -1, -1]])
KEYS = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()


def test_several_tokens_need_a_routing() -> None:
    with pytest.raises(AdapterError, match="no routing"):
        RoutingContext().look_up(torch.zeros(2, 6, 4))
    assert RoutingContext().look_up(torch.zeros(2, 1, 4)) is None


def test_text_only_fits_every_shape() -> None:
    context = RoutingContext()
    context.routing = Routing.text_only()
    assert "text_only" in repr(context.routing)
    for shape in [(2, 6, 4), (3, 1, 4), (7, 4)]:
        assert context.look_up(torch.zeros(*shape)) is None


def test_prefill_steps_beams_and_flattened_inputs() -> None:
    context = RoutingContext()
    context.routing = Routing(IDS, KEYS)
    assert context.look_up(torch.zeros(2, 6, 4)) is context.routing
    assert context.look_up(torch.zeros(12, 4)) is context.routing  # OPT flattens its batch
    assert context.look_up(torch.zeros(2, 4)) is None  # and its steps
    for rows in (1, 2, 6):
        assert context.look_up(torch.zeros(rows, 1, 4)) is None
    with torch.no_grad():
        assert context.look_up(torch.zeros(6, 6, 4)).shape == (6, 6)


def test_latents_are_those_of_the_prompt_and_of_the_text_after_it() -> None:
    """DeepSeek's attention reads (B,1,S,D), in steps from its cache: the whole of it."""
    context, llm, cache = RoutingContext(), nn.Embedding(9, 4), DynamicCache()
    context.routing = Routing(IDS, KEYS)
    assert context.look_up(torch.zeros(2, 1, 6, 4)) is context.routing
    with pytest.raises(AdapterError, match="very batch"):
        context.look_up(torch.zeros(2, 1, 8, 4))  # of no cache that began with this prompt
    asked: list[tuple[int, ...]] = [(2, 1, 6, 4), (2, 1, 8, 4)]
    found: list[Routing | None] = []
    llm.forward = lambda *_, **__: found.append(context.look_up(torch.zeros(*asked[len(found)])))
    context.watch(llm)
    llm(torch.ones(2, 6, dtype=torch.long), past_key_values=cache)
    cache.update(torch.zeros(2, 1, 7, 4), torch.zeros(2, 1, 7, 4), 0)
    llm(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    assert found[0] is context.routing
    assert found[1] is not None
    assert found[1].modality_ids.tolist() == [[*row, 0, 0] for row in IDS.tolist()]
    assert found[1].key_index is context.routing.key_index


@pytest.mark.parametrize("name", ["past_key_values", "cache", None])
def test_a_cache_is_known_by_either_of_its_names_or_its_place(name: str | None) -> None:
    """transformers has passed it as `cache` since 5.24."""
    context, cache, token = RoutingContext(), DynamicCache(), torch.ones(1, 1, dtype=torch.long)
    context.routing = Routing(torch.tensor([[1]]), torch.tensor([[False]]))
    llm, seen = nn.Embedding(3, 4), []
    llm.forward = lambda *_, **__: seen.append(context.look_up(torch.zeros(1, 1, 4)))
    context.watch(llm)
    args, kwargs = ((token,), {name: cache}) if name else ((token, None, None, cache), {})
    llm(*args, **kwargs)
    cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)
    llm(*args, **kwargs)
    assert seen == [context.routing, None]


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 7, 4), (3, 6, 4), (1, 6, 4), (5, 4), (1, 2, 6, 4)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    context = RoutingContext()
    context.routing = Routing(IDS, KEYS)
    with torch.no_grad(), pytest.raises(AdapterError, match=r"\(2, 6\)"):
        context.look_up(torch.zeros(*shape))


def test_repeated_rows_are_refused_where_gradients_are_recorded() -> None:
    context = RoutingContext()
    context.routing = Routing(IDS, KEYS)
    with pytest.raises(AdapterError, match="of this very batch"):
        context.look_up(torch.zeros(4, 6, 4))
