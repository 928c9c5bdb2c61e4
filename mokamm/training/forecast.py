"""The memory of a run, told before its first step, compared with what is measured after it, and used for advice.

    forecast = Forecast.of(model, config, ranks)     reads counts and shapes only: an Outline (mokamm/outline.py) will do
    print(forecast.table())                          a line for each ZeRO stage, the chosen one marked
    with explained(forecast): ...                    running out of memory becomes a UserError with the three settings
                                                     that would help most, each predicted anew with its new value

Of an LLM whose config does not say what the formulas need (state spaces without heads) nothing is predicted, and one
line says so in the place of the table. Cost: nothing is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from data.schema import IGNORED, UserError
from mokamm.adapters.targets import linear_names, tuner_layers
from mokamm.config import RunConfig
from mokamm.quantization import check_trainable
from mokamm.training.engine import bucket_elements, deepspeed_config
from mokamm.training.launch import Ranks
from mokamm.training.memory import Media, Memory, Network, Setting, Weights, predict
from mokamm.training.watch import memory_gb

COLUMNS = ("frozen", "trained", "gradients", "optimizer", "activations", "logits", "encoders", "buffers", "total")
FIRST_READERS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # who reads the same input
FAMILY = {  # methods that keep about what another one keeps; a frozen A keeps less, so that is an upper bound
    "multi_lora": "moka", "lori_moka_d": "moka", "lori_moka_s": "moka", "lori_d": "lora", "lori_s": "lora"
}  # fmt: skip
# bytes of a weight (mokamm/quantization.py), with the scales of 64 weights in a byte, and theirs of 256 in four
QUANTIZED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
AFTER_ATTENTION = ("o_proj", "out_proj")  # their input is kept as the attention's output


class UnknownShape(Exception):
    """What the formulas need is not in an LLM's config."""


@dataclass(frozen=True)
class Forecast:
    weights: tuple[Weights, ...]
    network: Network | None  # None: nothing is predicted
    setting: Setting
    config: RunConfig
    libraries: float = 0.0  # bytes that Python and its libraries take of what is measured (on CPU only)
    capacity: float = 0.0  # bytes of the GPU, or of the computer; 0: not known
    unknown: str = ""  # why nothing is predicted

    @classmethod
    def of(cls, model: Any, config: RunConfig, ranks: Ranks, capacity: float | None = None) -> Forecast:
        """model: a MultimodalLM or Outline; capacity: of another machine than this one, in bytes.

        Raises UserError for a DeepSpeed JSON that does not fit the run.
        """
        check_trainable(config)
        shapes = next(model.llm.parameters()).is_meta
        weights = weights_of(model, config.model.llm.quantization if shapes else None)
        setting = setting_of(config, ranks, sum(w.elements for w in weights if w.trained))
        capacity = _capacity(ranks) if capacity is None else capacity
        libraries = 0.0 if shapes else _libraries(weights, ranks)
        network, unknown = None, ""
        try:
            network = network_of(model, config)
        except UnknownShape as error:
            unknown = f"memory is not predicted for this LLM: {error}"
        return cls(tuple(weights), network, setting, config, libraries, capacity, unknown)

    def memory(self, **changes: Any) -> Memory:
        """changes: of Setting's fields; `attention` and `weight_bytes` of Network's. Of a known network only."""
        assert self.network is not None
        network = {key: changes.pop(key) for key in ("attention", "weight_bytes") if key in changes}
        weights = self.weights
        if "weight_bytes" in network:
            weights = tuple(replace(w, bytes_each=min(w.bytes_each, 2)) if w.part == "llm" else w for w in weights)
        return predict(weights, replace(self.network, **network), replace(self.setting, **changes))

    def total(self) -> float:
        return self.memory().total + self.libraries

    def building(self) -> float:
        """Bytes of all weights, which each process has in the computer's memory before ZeRO-3 shards them."""
        return sum(w.elements * w.bytes_each for w in self.weights) + self.libraries

    def zero_stages(self) -> tuple[int, ...]:
        """Those of ZeRO that the run may have: ZeRO-3 cannot shard a quantized LLM (mokamm/quantization.py)."""
        return (1, 2) if self.config.model.llm.quantization else (1, 2, 3)

    def stages(self) -> dict[int | None, str]:
        """The ways to run that are told of: as configured, and every ZeRO stage that can be."""
        own = self.setting.stage
        return {None if own is None else 0: "plain PyTorch" if own is None else "ZeRO-0"} | {
            stage: f"ZeRO-{stage}" for stage in self.zero_stages()
        }

    # ---- before the first step -------------------------------------------------------------------------------------

    def table(self) -> str:
        """Lines for people: every stage, what it consists of, the chosen one marked."""
        if self.network is None:
            return self.unknown
        s = self.setting
        rows = f"{s.batch} rows of {s.length} tokens (data.max_length)"
        lines = [f"predicted memory of each process, at most ({rows}, {s.ranks} in all):"]
        lines += [" " * 16 + "".join(f"{name:>12}" for name in COLUMNS)]
        for stage, name in self.stages().items():
            found = self.memory(stage=stage)
            cells = "".join(f"{size(getattr(found, column)):>12}" for column in COLUMNS)
            host = f"  and {size(found.host)} of the computer's" if found.host else ""
            lines.append(f"{'> ' if stage == s.stage else '  '}{name:14}{cells}{host}")
        if self.libraries:
            lines.append(f"  Python and its libraries take {size(self.libraries)} beside it")
        if s.stage == 3 and self.building() > self.total():
            lines.append(f"  until it is sharded, each process has {size(self.building())} in the computer's memory")
        if self.capacity and self.total() > self.capacity:
            lines += [f"note: that is more than the {size(self.capacity)} there are; what would help most:"]
            lines += self.advice()
        return "\n".join(lines)

    # ---- after it --------------------------------------------------------------------------------------------------

    def compared(self, micro_batches: list[Any]) -> str:
        """The measured peak beside the prediction for the very batches that this process has seen."""
        peak = f"measured peak {size(memory_gb() * 2**30)} after the first step"
        if self.network is None:
            return peak
        largest = max(micro_batches, key=lambda batch: batch["input_ids"].numel())
        rows, length = largest["input_ids"].shape
        samples = len(largest["samples"])  # more than rows where they share them: media count by the sample
        answers = float((largest["labels"] != IGNORED).float().mean())
        each = -(-rows * length // samples)
        found = self.memory(batch=samples, length=each, answers=answers).total + self.libraries
        return f"{peak} (predicted {size(found)} for its {rows} rows of {length} tokens)"

    # ---- advice ----------------------------------------------------------------------------------------------------

    def advice(self, validating: bool = False) -> list[str]:
        """The three settings that save most by prediction, as they are typed; fewer where fewer help.

        validating: for a validation, which has a batch size of its own and keeps nothing for a backward pass.
        """
        batch = self.config.training.eval_batch_size if validating else self.setting.batch

        def peak(**changes: Any) -> float:
            found = self.memory(**{"batch": batch, **changes})
            return found.total - (found.activations if validating else 0.0)

        now = peak()
        best: dict[str, tuple[float, str]] = {}  # of several values of one setting, the one that saves most
        for typed, changes in self._changes(batch, validating):
            name = typed.partition("=")[0]
            best[name] = max((now - peak(**changes), typed), best.get(name, (0.0, "")))
        chosen = sorted((pair for pair in best.values() if pair[0] > 0.005 * now), reverse=True)[:3]
        width = max((len(typed) for _, typed in chosen), default=0)
        return [f"  {typed:{width}}  -{size(saved)}" for saved, typed in chosen]

    def _changes(self, batch: int, validating: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """(what to type, changed fields) of every setting that saves memory and leaves the method as it is."""
        s, training = self.setting, self.config.training
        assert self.network is not None
        if batch > 1:
            typed = f"training.per_device_{'eval' if validating else 'train'}_batch_size={batch // 2}"
            if not validating:  # the steps stay what they were
                accumulation = -(-training.gradient_accumulation_steps * batch // (batch // 2))
                typed += f" training.gradient_accumulation_steps={accumulation}"
            yield typed, {"batch": batch // 2}
        if not (s.checkpointing or validating):
            yield "training.gradient_checkpointing=true", {"checkpointing": True}
        if s.length > 1:
            yield f"data.max_length={s.length // 2}", {"length": s.length // 2}
        if self.network.attention == "eager":
            yield "model.llm.attention=sdpa", {"attention": "sdpa"}
        if s.stage is None and self.config.method == "full":
            pass  # plain PyTorch would update 16-bit weights
        elif not s.bf16:
            yield "training.bf16=true model.llm.dtype=bfloat16", {"bf16": True, "weight_bytes": 2}
        elif self.network.weight_bytes == 4 and s.stage is None:
            yield "model.llm.dtype=bfloat16", {"weight_bytes": 2}
        for stage in self.zero_stages()[1:]:
            if stage > (s.stage or 0):
                yield f"training.deepspeed=configs/deepspeed/zero{stage}.json", {"stage": stage}
            if not s.on_cpu and not s.offload_optimizer:
                offload = {"stage": stage, "offload_optimizer": True, "offload_parameters": stage == 3}
                yield f"training.deepspeed=configs/deepspeed/zero{stage}_offload.json", offload


# ---- facts -----------------------------------------------------------------------------------------------------------


def weights_of(model: Any, quantization: str | None = None) -> list[Weights]:
    """Every part of the model, by dtype and whether it trains.

    quantization: of an Outline, whose Linear layers are counted as they will be read (all but the output layer)."""
    found: dict[tuple[str, float, bool], list[int]] = {}
    packed: set[int] = set()
    if quantization:
        modules, head = dict(model.llm.named_modules()), model.llm.get_output_embeddings()
        linear = [m for m in map(modules.get, linear_names(model.llm)) if m is not head]
        packed = {id(cast(Any, getattr(m, "base_layer", m)).weight) for m in linear}
    named = [("projector" if name.startswith("projectors.") else "llm", p) for name, p in model.named_parameters()]
    encoders = getattr(model.perception, "encoders", {}).values()
    named += [("encoder", t) for e in encoders for t in (*e.parameters(), *e.buffers())]
    for part, tensor in named:
        part = "adapter" if part == "llm" and tensor.requires_grad else part
        count = getattr(tensor, "ds_numel", tensor.numel())
        size_each = QUANTIZED[quantization] if quantization and id(tensor) in packed else tensor.element_size()
        found.setdefault((part, size_each, tensor.requires_grad), []).append(count)
    return [
        Weights(part, sum(counts), each, trained, sum(c for c in counts if c < 100_000))
        for (part, each, trained), counts in found.items()
    ]


def network_of(model: Any, config: RunConfig) -> Network:
    """The LLM's shape from its transformers config, the adapter's from its layers. Raises UnknownShape."""
    llm, adapter = model.llm, config.adapter
    shape = llm.config.get_text_config()
    method = config.method
    width, heads = _number(shape, "hidden_size"), _number(shape, "num_attention_heads")
    linear = [(name, m) for name, m in llm.named_modules() if isinstance(m, nn.Linear)]
    outputs = changed = 0
    if method == "full":
        trained = [(n.rpartition(".")[2], m.in_features) for n, m in linear if m is not llm.get_output_embeddings()]
    else:
        layers = [(name.rpartition(".")[2], layer) for name, layer in tuner_layers(llm).items()]
        trained = [(name, int(cast(Any, m).in_features)) for name, m in layers]
        outputs = sum(int(cast(Any, m).out_features) for _, m in layers)
        if method == "hira" and (adapter.one_matmul is False or adapter.lora_dropout):
            changed = sum(int(cast(Any, m).in_features * cast(Any, m).out_features) for _, m in layers)
    once = [
        (name, width)
        for name, width in trained
        if name not in AFTER_ATTENTION and FIRST_READERS.get(name) not in {other for other, _ in trained}
    ]
    count = _number(shape, "num_hidden_layers")
    return Network(
        layers=count,
        width=width,
        heads=heads,
        head_width=_number(shape, "head_dim", width // heads),
        intermediate=_number(shape, "intermediate_size", 4 * width),
        vocabulary=_number(shape, "vocab_size"),
        attention=config.model.llm.attention,
        gated=any("gate" in name.rpartition(".")[2] for name, _ in linear) or "gate_proj" in {n for n, _ in trained},
        method=FAMILY.get(method, method),
        rank=adapter.r,
        linears=len(trained) // count,
        inputs=sum(width for _, width in trained) // count,
        distinct_inputs=sum(width for _, width in once) // count,
        outputs=outputs // count,
        changed=changed // count,
        dropout=adapter.lora_dropout > 0,
        linear_elements=sum(m.weight.numel() for _, m in linear),
        weight_bytes=llm.get_input_embeddings().weight.element_size(),
        media=tuple(_media(name, model) for name in getattr(model, "senses", {})),
    )


def _number(shape: Any, name: str, otherwise: int | None = None) -> int:
    """A number of the LLM's config, of one that differs by layer the largest. Raises UnknownShape."""
    found = getattr(shape, name, None) or otherwise
    each = [n for n in (found if isinstance(found, list | tuple) else [found]) if isinstance(n, int)]
    if not each:
        raise UnknownShape(f"the config of '{shape.model_type}' has no {name}")
    return max(each)


def _media(name: str, model: Any) -> Media:
    """A modality's segments and its projector."""
    sense = model.senses[name]
    return Media(sense.segments, sense.tokens(sense.most_patches), model.projectors[name].kept(sense.most_patches))


def setting_of(config: RunConfig, ranks: Ranks, trained: int) -> Setting:
    """The settings of a run; trained: the number of trained elements, which decides DeepSpeed's buckets."""
    training = config.training
    found = Setting(
        batch=training.per_device_train_batch_size,
        length=config.data.max_length,
        ranks=ranks.world,
        bf16=training.bf16,
        checkpointing=training.gradient_checkpointing,
        bucket=bucket_elements(trained),
        overlap=ranks.device.type == "cuda",
        on_cpu=ranks.device.type == "cpu",
    )
    if not training.deepspeed:
        return found
    zero = deepspeed_config(training, ranks, trained).get("zero_optimization", {})
    return replace(
        found,
        stage=int(zero.get("stage", 0)),
        offload_optimizer=_offloads(zero, "offload_optimizer"),
        offload_parameters=_offloads(zero, "offload_param"),
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        overlap=bool(zero.get("overlap_comm", False)),
        live=int(zero.get("stage3_max_live_parameters", 10**9)),
    )


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"


def _libraries(weights: list[Weights], ranks: Ranks) -> float:
    """What this process holds beside the weights; what is measured on a GPU does not count it."""
    if ranks.device.type != "cpu":
        return 0.0
    return max(0.0, memory_gb() * 2**30 - sum(float(w.elements * w.bytes_each) for w in weights))


def _capacity(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        return float(torch.cuda.get_device_properties(ranks.device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def size(count: float) -> str:
    """Bytes for people; GB = 2^30, as in metrics.jsonl."""
    return f"{count / 2**30:.2f} GB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MB"


# ---- out of memory ---------------------------------------------------------------------------------------------------

MARKS = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "could not allocate", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, of PyTorch on any device or of Python, says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(mark in str(error) for mark in MARKS)


@contextmanager
def explained(forecast: Forecast | None, validating: bool = False) -> Iterator[None]:
    """Running out of memory within it is told in one message (UserError). None: the model is not built yet."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_message(forecast, validating, error)) from error


def _message(forecast: Forecast | None, validating: bool, error: BaseException) -> str:
    said = " ".join(str(error).split())[:160] or type(error).__name__
    if forecast is None:
        return (
            f"memory ran out while the model was being built ({said}). Smaller weights help: model.llm.dtype=bfloat16, "
            "a smaller model.llm.path, or fewer processes on this machine (each reads the LLM whole)"
        )
    s = forecast.setting
    head = f"memory ran out {'in a validation' if validating else 'in training'} ({said})."
    if forecast.network is None:
        rows = f"training.per_device_{'eval' if validating else 'train'}_batch_size"
        return f"{head} A smaller {rows} or data.max_length helps, and training.gradient_checkpointing=true"
    predicted = forecast.total()
    batch, usable = s.batch, "gradient_checkpointing=true"
    if validating:
        batch, usable = forecast.config.training.eval_batch_size, "per_device_eval_batch_size"
        found = forecast.memory(batch=batch)
        predicted = found.total - found.activations + forecast.libraries
    rows = f"{batch} rows of {s.length} tokens"
    head += f" Predicted for {rows}: {size(predicted)} for each process; there are {size(forecast.capacity)}."
    lines = [head, "What would help most, by prediction:", *forecast.advice(validating)]
    lines += [
        "Add them to the command line, or write them into the YAML. Checkpoints of this run stay usable with "
        f"training.{usable}; with the others begin anew (another training.output_dir)"
    ]
    return "\n".join(lines)
