"""What the tuners with a frozen A have in common (LORI_S, and MOKA with `frozen_a`): A is remade, B may be sparse.

    wrap    A is drawn from the config's seed (frozen_a.py); its hash goes into the config
    save    without A, unless `store_a`; a sparse B as values and mask
    load    A is drawn again and compared with the hash, or read where it was stored; masks set the sizes of the values

A config has: frozen_a, sparse_b, a_seed, a_version, a_hash, store_a, format_version. Layers keep A and B in the two
containers that their class names in `factors`. Cost: none in the forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn

from mokamm.adapters.frozen_a import VERSION, check_version, digest, draw
from mokamm.adapters.masks import Mask
from mokamm.adapters.peft_bridge import PREFIX, Tuner, TunerLayer, freeze
from mokamm.adapters.sparse_b import SparseB
from mokamm.routing import AdapterError


class FrozenA(nn.Linear):
    """A that is drawn and never trains. Its `shape` is saved where its weight is not, so that a folder can be read alone."""

    def __init__(self, in_features: int, rows: int, device: torch.device) -> None:
        super().__init__(in_features, rows, bias=False, device=device)
        self.register_buffer("shape", torch.tensor([rows, in_features], dtype=torch.int32, device=device))

    def reset_parameters(self) -> None:
        """Nothing: `draw_into` fills it, and no global generator is asked."""

    @torch.no_grad()
    def draw_into(self, key: str, config: Any) -> None:
        """Draw A for the layer of that name; nothing on the meta device."""
        if not self.weight.is_meta:
            shape = (self.out_features, self.in_features)
            # a stored A takes the place of this one when it is loaded, whatever generator drew it
            version = VERSION if config.store_a else config.a_version
            self.weight.copy_(draw(key, shape, config.a_seed, version))


def new_a(
    layer: TunerLayer,
    rows: int,
    config: Any,
    key: str,
    kind: type[nn.Linear] = nn.Linear,
    frozen: type[FrozenA] = FrozenA,
) -> nn.Linear:
    """A layer's A on the device of its base: `frozen` and drawn, or `kind` with nn.Linear's own initialisation."""
    device = getattr(layer.get_base_layer(), "weight", torch.empty(0)).device
    if not config.frozen_a:
        return kind(layer.in_features, rows, bias=False, device="meta" if device.type == "meta" else None)
    A = frozen(layer.in_features, rows, device)
    A.draw_into(key, config)
    return A


def new_b(layer: TunerLayer, columns: int, config: Any, kind: type[nn.Linear] = nn.Linear) -> nn.Module:
    """A layer's B, zero: sparse, waiting for its mask, or dense."""
    device = getattr(layer.get_base_layer(), "weight", torch.empty(0)).device
    if config.sparse_b:
        return SparseB(columns, layer.out_features, device)
    B = kind(columns, layer.out_features, bias=False, device="meta" if device.type == "meta" else None)
    nn.init.zeros_(B.weight)
    return B


class FrozenATuner(Tuner):
    """A tuner whose layers have `factors`, the names of their containers of A and of B."""

    factors: tuple[str, str]

    def layers(self) -> Iterator[tuple[str, TunerLayer]]:
        """The wrapped layers by their names in the LLM."""
        found = ((name, m) for name, m in self.model.named_modules() if isinstance(m, self.tuner_layer_cls))
        return cast("Iterator[tuple[str, TunerLayer]]", found)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = cast(Any, self.peft_config[adapter_name])
        if not config.frozen_a:
            return
        for _, layer in self.layers():
            if adapter_name in getattr(layer, self.factors[0]):
                freeze(layer, adapter_name, self.factors[0])
        self.check_a(config, adapter_name)

    def check_a(self, config: Any, adapter_name: str) -> None:
        """Record the hash of A in the config, or compare with the one that is there."""
        named = dict(self._factor(0, adapter_name))
        if config.store_a or any(A.weight.is_meta for A in named.values()):
            return
        found = digest((name, A.weight) for name, A in named.items())
        if config.a_hash is None:
            config.a_hash = found
        elif config.a_hash != found:
            raise AdapterError(
                f"A cannot be remade: drawn from seed {config.a_seed} it has the hash {found[:12]}, the adapter was trained "
                f"with {config.a_hash[:12]}. Its layers have other names or shapes in this LLM, or the seed was changed; "
                "load it on the LLM it was trained on, or save it with store_a=True there."
            )

    def _factor(self, which: int, adapter_name: str) -> Iterator[tuple[str, nn.Linear]]:
        for name, layer in self.layers():
            if adapter_name in (found := getattr(layer, self.factors[which])):
                yield name, found[adapter_name]

    # -- masks --

    def set_mask(self, mask: Mask, adapter_name: str = "default") -> None:
        """Keep the entries of a mask; their values begin at 0. Raises AdapterError for a mask of another model or A."""
        config = cast(Any, self.peft_config[adapter_name])
        if not config.sparse_b:
            raise AdapterError("This adapter's B is dense: a mask needs lori_s, or MokaConfig(sparse_b=True).")
        found = {name: cast(Any, B) for name, B in self._factor(1, adapter_name)}
        mask.check({name: B.size for name, B in found.items()})
        factors = dict(self._factor(0, adapter_name))
        drawn = mask.a_hash and not any(A.weight.is_meta for A in factors.values())
        own = config.a_hash or (digest((name, A.weight) for name, A in factors.items()) if drawn else None)
        if mask.a_hash and own and mask.a_hash != own:
            raise AdapterError(
                f"The mask was cut from a B that was trained with another A (hash {mask.a_hash[:12]}; this adapter's is "
                f"{own[:12]}): use the same a_seed for both, or cut a mask from an adapter with this A."
            )
        for name, B in found.items():
            B.set_mask(mask.bits[name], name)

    # -- PEFT's folders --

    @classmethod
    def to_save(cls, config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not config.frozen_a or config.store_a:
            return state
        left_out = re.compile(rf"\.{cls.factors[0]}\.[^.]+\.weight$")
        return {key: tensor for key, tensor in state.items() if not left_out.search(key)}

    @classmethod
    def before_load(cls, model: nn.Module, config: Any, adapter_name: str, state: dict[str, Tensor]) -> None:
        found = {
            name.removeprefix(PREFIX): (name, layer)
            for name, layer in model.named_modules()
            if isinstance(layer, cls.tuner_layer_cls) and adapter_name in getattr(layer, cls.factors[0])
        }
        if config.frozen_a:
            cls._a_for(config, adapter_name, found, state)
        if config.sparse_b:
            for key, layer in found.values():
                prefix, device = f"{_with(key)}.{cls.factors[1]}", cast(Tensor, layer.get_base_layer().weight).device
                _fit(getattr(layer, cls.factors[1])[adapter_name], prefix, state, device)

    @classmethod
    def _a_for(cls, config: Any, adapter_name: str, found: dict[str, tuple[str, Any]], state: dict) -> None:
        """A joins the tensors to be loaded where the folder does not hold it."""
        a_name = cls.factors[0]
        for key, layer in found.values():
            own, saved = getattr(layer, a_name)[adapter_name], state.get(f"{_with(key)}.{a_name}.shape")
            if saved is not None and saved.tolist() != [own.out_features, own.in_features]:
                raise AdapterError(
                    f"{key}: A is {tuple(saved.tolist())} in the folder and {(own.out_features, own.in_features)} here; the "
                    "adapter belongs to another LLM or rank."
                )
        if any(key.endswith(f".{a_name}.weight") for key in state):
            keys = {name: f"{_with(key)}.{a_name}.weight" for name, (key, _) in found.items()}
            stored = [(name, state[key]) for name, key in keys.items() if key in state]
            if config.store_a and config.a_hash and digest(stored) != config.a_hash:
                raise AdapterError(
                    "The stored A is not the one whose hash the adapter's config records; one was changed."
                )
            config.store_a, config.a_hash = True, None  # an A that was stored stays stored
            return
        if config.store_a:
            raise AdapterError(f"The adapter says that its A is stored (store_a), but its file holds no {a_name}.")
        drawn = {}
        for name, (key, layer) in found.items():
            A: Tensor = getattr(layer, a_name)[adapter_name].weight
            if A.is_meta:  # PEFT's low_cpu_mem_usage
                A = drawn[name] = draw(name, (A.shape[0], A.shape[1]), config.a_seed, config.a_version)
            state[f"{_with(key)}.{a_name}.weight"] = A.detach()
        if drawn and config.a_hash and digest(drawn.items()) != config.a_hash:
            raise AdapterError("A cannot be remade: its hash is not the one recorded when the adapter was trained.")


def _with(key: str) -> str:
    """The name of a layer as a folder's keys have it."""
    return key if key.startswith(PREFIX) else PREFIX + key


def _fit(B: SparseB, prefix: str, state: dict[str, Tensor], device: torch.device) -> None:
    """Give a SparseB the mask and the number of values of a folder."""
    if (mask := state.get(f"{prefix}.mask")) is None:
        raise AdapterError(
            f"The adapter's file holds no {prefix}.mask: it was saved before it had a mask (set_mask), is none of a "
            "sparse B, or is not whole."
        )
    if B.mask is None or not torch.equal(B.mask.cpu(), mask.cpu()):  # an optimizer may hold the values already
        B.set_mask(mask, prefix, device)
    B.clear_frozen()
    if f"{prefix}.frozen_mask" in state and f"{prefix}.frozen_values" in state:
        B.set_frozen(state[f"{prefix}.frozen_mask"], state[f"{prefix}.frozen_values"], prefix)


def check_same_a(config: PeftConfig, saved: PeftConfig) -> None:
    """Raises AdapterError where two configs record different A's, or the saved one's cannot be drawn here."""
    if getattr(saved, "frozen_a", False) and not cast(Any, saved).store_a:
        check_version(cast(Any, saved).a_version)
    own, other = getattr(config, "a_hash", None), getattr(saved, "a_hash", None)
    if own and other and own != other:
        raise AdapterError(
            f"The adapter was trained with another A (hash {other[:12]}; this model's is {own[:12]}): its a_seed is "
            f"{getattr(saved, 'a_seed', '?')}, this model's {getattr(config, 'a_seed', '?')}. Use that seed."
        )
