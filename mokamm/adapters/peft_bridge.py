"""Every touch of PEFT's private API, so that a new PEFT release (pinned: 0.21) is one file to look at.

    register_method   adds a type to PEFT's closed enum and registers config and tuner
    TunerLayer        a wrapped Linear: PEFT's bookkeeping, none of the mathematics
    Tuner             has the targets found (targets.py), counts them, wraps each in its layer
    let_act           switches an adapted module on and off for some steps
    borrowed, freeze, saved_keys      parameters that several modules hold, that never train, that go into a file
    HiraLinear        PEFT's own HiRA layer, and `change_class`, which gives it another forward

Importing this file changes two things of PEFT itself, at the end of it: a layer may sit out, whatever enables and disables
adapters meanwhile, and targets that are names of a model's own linear modules are never taken for its experts.

A method of ours (`routed.py`) subclasses TunerLayer and Tuner. Costs nothing at run time.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.hira.layer import Linear as HiraLinear
from peft.tuners.lora.variants import _register_frozen_peft_weight
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import register_peft_method, transformers_weight_conversion
from torch import Tensor, nn

from mokamm.adapters.targets import linear_names, match_targets, name_whole_modules, tuner_layers
from mokamm.routing import AdapterError

PREFIX = "base_model.model."  # of a PeftModel's keys, before the names in the LLM


def register_method(name: str, config_cls: type, tuner_cls: type[Tuner]) -> None:
    """Makes `name` a PEFT method: `get_peft_model`, saving and `PeftModel.from_pretrained` know it from then on."""
    value = name.upper()
    if value not in PeftType.__members__:
        member: Any = str.__new__(PeftType, value)
        member._name_ = member._value_ = value
        member.__objclass__, member._sort_order_ = PeftType, len(PeftType)
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
        type.__setattr__(PeftType, value, member)
    if PeftType(value) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls, prefix=tuner_cls.prefix)


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuses names that PEFT could not tell from a module's when it saves (it would drop or garble keys)."""
    inside = "\0"
    taken = {"base_model", "model", "base_layer", "weight", "bias"}
    for name, module in model.named_modules():
        if not name.startswith(inside):
            taken.update(name.split("."))
            inside = name + "." if isinstance(module, BaseTunerLayer) else inside
    if adapter_name in taken or "." in adapter_name or not adapter_name:
        raise AdapterError(
            f"An adapter cannot be named '{adapter_name}': it is empty, has a dot in it, or is the name of a module of "
            f"this model, which would garble the saved keys. Choose another, such as 'adapter_{adapter_name}'."
        )


def tied_layers(model: nn.Module) -> list[str]:
    """Names of adapted modules of which a weight is another module's too, such as an output head tied to embeddings."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    bases = {name: cast(Any, layer).get_base_layer() for name, layer in tuner_layers(model).items()}
    return [name for name, base in bases.items() if any(owners[id(p)] > 1 for p in base.parameters(recurse=False))]


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that adapters have added to a model, whether it trains or not (LoRI's A)."""
    for layer in tuner_layers(model).values():
        named = cast(nn.Module, layer).named_parameters()
        yield from (parameter for name, parameter in named if not name.startswith("base_layer."))


def let_act(layer: BaseTunerLayer, acts: bool) -> None:
    """Whether the layer's adapters may act in the coming forward passes; what is trainable, or disabled, stays so.

    PEFT's `enable_adapters` would take requires_grad away, and with it the parameters from an engine that is built; and
    the end of its `disable_adapter` sets that flag for all layers.
    """
    cast(Any, layer).sits_out = not acts


def borrowed(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """(layer, parameter) where a layer reads a parameter of a module inside it, which it does not call: HiRA, DoRA.

    What shards parameters and makes them whole when their module is called (ZeRO-3) must know of them.
    """
    for layer in tuner_layers(model).values():
        if isinstance(layer, HiraLinear) or getattr(layer, "lora_magnitude_vector", None):
            module = cast(nn.Module, layer)
            yield from ((module, parameter) for parameter in module.parameters())


def change_class(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> nn.Module:
    """Every module of exactly the class `old` becomes one of its subclass `new`, which adds methods and no state."""
    assert issubclass(new, old)
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
    return model


def freeze(layer: Any, adapter_name: str, weight_name: str) -> None:
    """That weight (`lora_A`) of that adapter in a wrapped layer never trains, whatever `set_adapter` does later."""
    _register_frozen_peft_weight(layer, adapter_name, weight_name)


def saved_keys(model: Any, adapter_name: str = "default") -> set[str]:
    """Which keys of a PeftModel's state dict are written into the adapter's folder, whether they train or not."""
    config, keys = model.peft_config[adapter_name], {key: key for key in model.state_dict()}
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    kept = tuner._get_adapter_state_dict(
        model=model, config=config, adapter_name=adapter_name, state_dict=cast(Any, keys), unwanted_adapter_names=[]
    )
    return set(cast("dict[str, str]", kept).values())


class TunerLayer(nn.Module, BaseTunerLayer):
    """A wrapped linear module, before any adapter is added to it."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise AdapterError(f"A {type(base_layer).__name__} cannot be adapted; only linear modules can.")
        self.in_features, self.out_features = int(in_features), int(out_features)

    def add_adapter(self, name: str, config: Any, key: str) -> None:
        """Adds the adapter's parameters to this layer, whose name in the model is `key`."""
        raise NotImplementedError

    def place(self, adapter_name: str) -> None:
        """Brings a new adapter to the device and dtype of the wrapped module."""
        self._move_adapter_to_device_of_base_layer(adapter_name)

    @property
    def weight_is_transposed(self) -> bool:
        """Whether the base's weight is (in_features, out_features)."""
        return type(self.get_base_layer()).__name__ == "Conv1D"

    def to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Which of these adapters (None: the active ones) are not merged yet."""
        return check_adapters_to_merge(self, adapter_names)


class Tuner(BaseTuner):
    """PEFT's side of a method: checks names and targets, then wraps each target by `new_layer`.

    `target_report[adapter][target]` is the number of modules that each target matched.
    """

    uses_shared_state = True  # PEFT then refuses inject_adapter_in_model, which would lose the tuner
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def new_layer(self, target: nn.Module) -> TunerLayer:
        raise NotImplementedError

    def check_config(self, config: Any, names: list[str]) -> None:
        """A method's own checks, with the names of the modules that will be wrapped; before anything is changed."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would leave it out and use the active adapter for all rows
            raise AdapterError(
                f"A {self._kind} adapter cannot be chosen row by row (adapter_names): set_adapter() chooses for a batch."
            )
        yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterError(f"{self._kind} adapters cannot be combined by weights; only PEFT's LORA ones can.")

    @property
    def _kind(self) -> str:
        return cast(Any, next(iter(self.peft_config.values()))).peft_type.value

    @classmethod
    def to_save(cls, config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of an adapter's tensors its folder holds; keys still hold the adapter's name."""
        return state

    @classmethod
    def before_load(cls, model: nn.Module, config: Any, adapter_name: str, state: dict[str, Tensor]) -> None:
        """Makes a model ready for the tensors of a folder (keys without the adapter's name), or adds to them."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict, unwanted_adapter_names: list[str]
    ) -> dict:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return cls.to_save(config, found)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict
    ) -> dict:
        state = dict(state_dict)
        cls.before_load(model, config, adapter_name, state)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state)

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.target_report: dict[str, dict[str, int]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # names and a hash of this very LLM go into it: the caller's own may serve another one
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        check_adapter_name(model, adapter_name)
        name_whole_modules(model, config)
        found = match_targets(model, config)
        self.check_config(config, [name for names in found.values() for name in names])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.target_report[adapter_name] = {target: len(names) for target, names in found.items()}

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            cast(TunerLayer, target).add_adapter(adapter_name, peft_config, current_key)
            return
        layer = self.new_layer(target)
        layer.add_adapter(adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


# ---- what is changed of PEFT itself ----------------------------------------------------------------------------------

cast(Any, BaseTunerLayer).sits_out = False  # see let_act
cast(Any, BaseTunerLayer).disable_adapters = property(lambda layer: layer._disable_adapters or layer.sits_out)


def taken_for_experts(model_type: str | None) -> set[str]:
    """Last names of targets that PEFT takes for experts of such an LLM, as they were named before transformers 5 fused them.

    There it turns `gate_proj`, `up_proj` and `down_proj` of a LORA config into `target_parameters`, also where they are
    names of dense or shared MLPs, which then are not adapted. None: of any LLM.
    """
    mappings = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
    of_type = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type or "")
    return {name for key, names in mappings.items() if model_type is None or key == of_type for name in names}


_rewrite = transformers_weight_conversion.convert_peft_config_for_transformers


def _rewrite_unless_named(config: Any, model: nn.Module, conversions: Any) -> None:
    """Leaves alone a config whose targets are whole names of the model's linear modules; experts have none of these."""
    names = getattr(config, "target_modules", None) or ""
    if isinstance(names, str) or not set(names) <= set(linear_names(model)):
        _rewrite(config, model, conversions)
    elif config.peft_type == PeftType.LORA and taken_for_experts(cast(Any, model).config.model_type):
        config.target_modules = tuple(sorted(names))  # of a set or list of 20 names PEFT makes parts of names


cast(Any, transformers_weight_conversion).convert_peft_config_for_transformers = _rewrite_unless_named
