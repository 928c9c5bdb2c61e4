"""One interface over DeepSpeed (any ZeRO stage) and plain PyTorch (one process, or DDP).

    outputs = engine(batch, last)    forward; `last`: this micro batch completes the step; answers_only: as of the model
    engine.backward(loss, last)      losses of all micro batches and ranks are SUMMED: the caller divides by the step's
                                     number of answer tokens, and an engine undoes its own averaging
    norm = engine.step(factor)       every rate = base rate * factor; clip, update, clear; the norm before clipping, of
                                     all ranks; where it is not finite no update is made, on any of them
    engine.gather(parameters)        whole parameters inside, where ZeRO-3 shards them
    engine.state() / load_state()    optimizer state of this rank, loadable by torch.load(weights_only=True)
    engine.close()                   gives up what would keep the model in memory

Weights are not in the engine's state: they are written as safetensors (mokamm/weights.py) and loaded before the engine
is built. DeepSpeed's own checkpoints would hold them a second time, as a pickle, and the frozen ones with them.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.schema import UserError, listed
from mokamm.adapters.peft_bridge import borrowed
from mokamm.config import find_path
from mokamm.config_sections import TrainingConfig
from mokamm.training.launch import Ranks, limit_waiting
from mokamm.training.optimization import optimizer_arguments


class Engine(Protocol):
    def __call__(self, batch: Any, last: bool = True, answers_only: bool = False) -> dict[str, Tensor]: ...
    def train(self, mode: bool) -> None: ...
    def backward(self, loss: Tensor, last: bool) -> None: ...
    def step(self, factor: float) -> float: ...
    def groups(self) -> list[dict[str, Any]]: ...
    def gather(self, parameters: Iterable[Tensor]) -> AbstractContextManager[Any]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def build_engine(model: nn.Module, groups: list[dict[str, Any]], training: TrainingConfig, ranks: Ranks) -> Engine:
    if training.deepspeed:
        return DeepSpeedEngine(model, groups, training, ranks)
    return PlainEngine(model, groups, training, ranks)


def _set_rates(groups: list[dict[str, Any]], factor: float) -> None:
    for group in groups:
        group["lr"] = group["base_lr"] * factor


class PlainEngine:
    """torch.optim.AdamW, autocast where bf16 is asked for, DistributedDataParallel where there are several ranks."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], training: TrainingConfig, ranks: Ranks) -> None:
        self.world, self.max_norm = ranks.world, training.max_grad_norm
        self.module: nn.Module = model
        if ranks.world > 1:  # buffers (tables of positions, LoRI's masks) are equal everywhere and never change
            self.module = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, **optimizer_arguments(training))
        self.autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=training.bf16)

    def __call__(self, batch: Any, last: bool = True, answers_only: bool = False) -> dict[str, Tensor]:
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            self.module.require_backward_grad_sync = last  # as its no_sync() does
        with self.autocast:
            return self.module(batch, answers_only)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.world).backward()  # DDP averages over ranks

    def step(self, factor: float) -> float:
        limit = self.max_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        _set_rates(self.optimizer.param_groups, factor)
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def gather(self, parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
        return nullcontext()

    def state(self) -> dict[str, Any]:
        return _plain(self.optimizer.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Nothing to do: it goes with its last reference."""


class DeepSpeedEngine:
    """deepspeed.initialize with our optimizer and no scheduler; `auto` in the JSON is filled from the configuration."""

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]], training: TrainingConfig, ranks: Ranks) -> None:
        import deepspeed

        trained = sum(p.numel() for group in groups for p in group["params"])
        config = deepspeed_config(training, ranks, trained)
        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.scale = ranks.world * training.gradient_accumulation_steps  # DeepSpeed averages over both
        self.rank, self.world = ranks.rank, ranks.world
        if self.stage == 3:
            _shard(model, config, training.bf16, ranks.device)
        optimizer = _optimizer_class(config)(groups, **optimizer_arguments(training))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if self.stage == 3:
            for layer, parameter in borrowed(model):  # DeepSpeed itself sees it only while the parameter is not whole
                deepspeed.zero.register_external_parameter(layer, parameter)
        limit_waiting(training.ddp_timeout)
        self.plain = not hasattr(self.optimizer, "_global_grad_norm")  # stage 0 in float32: no optimizer of DeepSpeed's
        self.norm = 0.0
        if self.plain:
            self.optimizer.register_step_pre_hook(self._spare)

    def __call__(self, batch: Any, last: bool = True, answers_only: bool = False) -> dict[str, Tensor]:
        return self.engine(batch, answers_only)

    def train(self, mode: bool) -> None:
        self.engine.train(mode)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss * self.scale)
        if not last:
            self.engine.step()  # counts the micro batch; nothing is updated before the window's end

    def step(self, factor: float) -> float:
        """DeepSpeed's own optimizers leave an update without a finite norm out, and then call the norm infinite."""
        _set_rates(self.optimizer.param_groups, factor)
        if self.plain:
            grads = [p.grad for group in self.groups() for p in group["params"] if p.grad is not None]
            self.norm = float(torch.nn.utils.get_total_norm(grads))
        self.engine.step()
        return self.norm if self.plain else float(self.engine.get_global_grad_norm())

    def _spare(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before torch's own step: parameters without a gradient are left alone."""
        if not math.isfinite(self.norm):
            optimizer.zero_grad(set_to_none=True)

    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def gather(self, parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    def state(self) -> dict[str, Any]:
        return {k: _plain(v) for k, v in self.optimizer.state_dict().items() if k not in NOT_SAVED}

    def load_state(self, state: dict[str, Any]) -> None:
        fresh = self.optimizer.state_dict()
        whole = {**state, **{key: fresh[key] for key in NOT_SAVED if key in fresh}}
        if "zero_stage" in fresh:
            whole["zero_stage"] = fresh["zero_stage"]
        if self.stage == 0:
            self.optimizer.load_state_dict(whole)
            return
        by_rank = [whole if rank == self.rank else {} for rank in range(self.world)]
        self.optimizer.load_state_dict(by_rank, load_optimizer_states=True, load_from_fp32_weights=True)

    def close(self) -> None:
        """Hooks of DeepSpeed's hold the engine, and it the model. While there is a process group.

        Under ZeRO-3 its own parts hold each other beyond that: this rank's share of the weights stays.
        """
        self.engine.destroy()


def shards_weights(training: TrainingConfig) -> bool:
    """Whether ZeRO-3 is asked for: its model waits in the computer's memory, of which the engine gives the GPU its share."""
    config = json.loads(find_path(training.deepspeed).read_text()) if training.deepspeed else {}
    return int((config.get("zero_optimization") or {}).get("stage", 0)) == 3


def _shard(model: nn.Module, config: dict[str, Any], bf16: bool, device: torch.device) -> None:
    """One weight after the other goes to the device, and there this rank keeps its share of it.

    As deepspeed.initialize does, which would put the whole model there first.
    """
    import deepspeed

    offload = config["zero_optimization"].get("offload_param") or {}
    where = None if offload.get("device", "none") == "none" else offload["device"]
    if bf16:  # initialize wants it so of weights that are sharded already
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    pin = bool(offload.get("pin_memory", False))
    deepspeed.zero.Init(module=model, config_dict_or_path=config, remote_device=where, pin_memory=pin)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


NOT_SAVED = ("loss_scaler", "param_slice_mappings")  # objects that the next start builds anew, equal


def _plain(value: Any) -> Any:
    """A value that torch.load(weights_only=True) accepts: DeepSpeed's enums as numbers, its containers as Python's."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would be saved with all of its storage
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _optimizer_class(config: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    """DeepSpeed's CPU Adam where optimizer states are offloaded and a compiler can build it, else torch's AdamW."""
    device = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")
    if device == "none":
        return torch.optim.AdamW
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.op_builder import CPUAdamBuilder

        CPUAdamBuilder().load(verbose=False)
        return DeepSpeedCPUAdam
    except Exception as error:  # whatever a compiler may say; AdamW computes the same, more slowly
        print(
            f"note: DeepSpeed's CPU Adam cannot be built here ({type(error).__name__}); torch's AdamW takes its place",
            flush=True,
        )
        config["zero_force_ds_cpu_optimizer"] = False
        return torch.optim.AdamW


def bucket_elements(trained: int) -> int:
    """For "auto": DeepSpeed allocates a buffer of this many elements, however few are trained."""
    return max(100_000, min(trained, 500_000_000))


def deepspeed_config(training: TrainingConfig, ranks: Ranks, trained: int) -> dict[str, Any]:
    """The DeepSpeed JSON with `auto` filled in. What the run's configuration also says must agree with it."""
    path = find_path(training.deepspeed or "")
    config: dict[str, Any] = json.loads(path.read_text())
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(
                f"{path}: '{section}' is set there; mokamm sets it from the training section (learning_rate, ...); "
                f"remove it"
            )
    _check_precision(config, path)
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * ranks.world,
        "gradient_clipping": training.max_grad_norm,
        "bf16.enabled": training.bf16,
    }
    bucket = bucket_elements(trained)
    free = {
        "fp16.enabled": False,
        "zero_optimization.overlap_comm": ranks.device.type == "cuda",
        "zero_optimization.reduce_bucket_size": bucket,
        "zero_optimization.allgather_bucket_size": bucket,
        "zero_optimization.stage3_prefetch_bucket_size": bucket,
        "zero_optimization.stage3_param_persistence_threshold": 100_000,
        "zero_optimization.offload_optimizer.pin_memory": ranks.device.type == "cuda",
        "zero_optimization.offload_param.pin_memory": ranks.device.type == "cuda",
    }
    for key, value in ours.items():
        _put(config, key, value)
    checks = {
        "bf16.check_grad_overflow": True,
        "zero_optimization.compute_grad_norm": True,
    }  # training.on_nan needs them
    problems = _fill(config, {**ours, **free}, {**ours, **checks})
    if problems:
        raise UserError(listed(f"{path} does not fit this run:", problems))
    config["steps_per_print"] = 10**9
    return config


def _check_precision(config: dict[str, Any], path: Path) -> None:
    """Raises UserError for what DeepSpeed's optimizers, or training.on_nan, cannot do."""
    if (config.get("fp16") or {}).get("enabled") is True:
        raise UserError(
            f"{path}: 'fp16.enabled' is true; its first steps overflow while it seeks the scale of the loss, and here a "
            "gradient that is not finite is a bad step. Train with training.bf16=true, or in float32"
        )
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if (config.get("data_types") or {}).get("grad_accum_dtype") and stage in (0, 1):
        raise UserError(
            f"{path}: 'data_types.grad_accum_dtype' is set; DeepSpeed then has optimizers of another kind in ZeRO-0 and 1, "
            "which say nothing of the gradients' norm. Leave it out, or take ZeRO-2"
        )


def _put(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key that the JSON leaves out."""
    *sections, key = dotted.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config.setdefault(key, value)


def _fill(config: dict[str, Any], known: dict[str, Any], fixed: dict[str, Any], prefix: str = "") -> list[str]:
    problems = []
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            problems += _fill(value, known, fixed, f"{dotted}.")
        elif value == "auto" and dotted not in known:
            problems.append(
                f"'{dotted}' is \"auto\", and no setting of mokamm fills it; write a value, or leave the key out"
            )
        elif value == "auto":
            config[key] = known[dotted]
        elif dotted in fixed and value != fixed[dotted]:
            problems.append(
                f"'{dotted}' is {value}, the configuration and the {_what(dotted)} make it {fixed[dotted]}; write "
                f'"auto"'
            )
    return problems


def _what(dotted: str) -> str:
    return "number of ranks" if dotted == "train_batch_size" else "training section"
