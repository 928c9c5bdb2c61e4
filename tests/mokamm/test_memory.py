"""Predicted memory against what PyTorch really keeps, advice that does what it promises, and a real lack of memory."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.schema import UserError
from mokamm.config import RunConfig, load_config
from mokamm.training import memory
from mokamm.training.forecast import Forecast, explained, is_out_of_memory, network_of, setting_of, weights_of
from mokamm.training.launch import Ranks
from mokamm.training.loop import checkpoint_activations
from mokamm.training.memory import Media, Network, Setting, Weights

ROOT = Path(__file__).resolve().parents[2]
MODALITIES = ["text", "vision", "audio"]
KEYS, ANSWERS = 10, 0.25
CPU = Ranks(0, 0, 1, torch.device("cpu"), grouped=False)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations make and that still live; exact, whatever the machine does beside."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known, self.sizes = known, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known | self.sizes.keys():
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Stub:
    """As much of a MultimodalLM as a forecast reads: an LLM without media."""

    def __init__(self, llm):
        self.llm, self.perception = llm, None

    def named_parameters(self):
        return self.llm.named_parameters()


def build(method, dtype=torch.float32, attention="sdpa", dropout=0.0, device="cpu", **shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    from mokamm.adapters import wrap

    torch.manual_seed(0)
    small = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2}
    config = LlamaConfig(
        **{**small, "num_attention_heads": 4, "num_key_value_heads": 2, **shape}, attn_implementation=attention
    )
    with torch.device(device):
        llm = LlamaForCausalLM(config).to(dtype)
        return wrap(llm, method, MODALITIES, {"r": 4, "lora_alpha": 16, "lora_dropout": dropout}).train()


def configured(method="moka", **training) -> RunConfig:
    modality = {"encoder": {"name": "clip", "path": "x"}}
    model = {"llm": {"path": "x"}, "modalities": {"vision": modality, "audio": modality}}
    stage = 1 if method == "none" else 2
    adapter = {"r": 4} if method == "none" else {"method": method, "r": 4}
    return RunConfig.model_validate(
        {
            "model": model,
            "adapter": adapter,
            "data": {"train": [{"source": "messages", "path": "x"}]},
            "training": {"output_dir": "runs/x", "stage": stage, "use_cpu": True, **training},
        }
    )


def described(llm, config, attention="sdpa", dropout=False) -> Network:
    from dataclasses import replace

    modalities, config.model.modalities = config.model.modalities, {}
    network = network_of(Stub(llm), config)
    config.model.modalities = modalities
    return replace(network, attention=attention, dropout=dropout)


@contextmanager
def kept_for_backward(weights):
    """Every storage that autograd keeps inside, once, without the weights': {its key: a tensor of it}."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def bytes_of(kept) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measured(llm, batch: int, length: int, autocast: bool) -> dict[str, int]:
    """Bytes kept for the backward pass, and the peaks of the forward and of both passes, of one step's loss."""
    from mokamm.adapters import Routing, set_routing
    from mokamm.model import _given

    ids, keys = torch.zeros(batch, length, dtype=torch.long), torch.zeros(batch, length, dtype=torch.bool)
    ids[:, 5:50], keys[:, 60 : 60 + KEYS] = 1, True
    mask = torch.ones_like(ids)
    mask[0, -8:], ids[0, -8:] = 0, -1
    set_routing(llm, Routing(ids, keys))
    x = torch.randn(batch, length, llm.config.hidden_size, dtype=llm.get_input_embeddings().weight.dtype)
    x.requires_grad_()
    where = (torch.arange(batch * length) % length >= length * (1 - ANSWERS)).nonzero().flatten()
    weights = {p.untyped_storage()._cdata for p in llm.parameters()}

    def loss():
        given = _given(llm.get_output_embeddings(), where)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), given:
            rows = llm(inputs_embeds=x * 1, attention_mask=mask, use_cache=False).logits[0].float()
        return torch.nn.functional.cross_entropy(rows, torch.zeros_like(where), reduction="sum")

    with LiveBytes(weights) as live:
        with kept_for_backward(weights) as kept:
            total = loss()
        kept_bytes = bytes_of(kept)
        kept.clear()
        forward = live.peak
        total.backward()
    return {"kept": kept_bytes, "forward": forward, "peak": live.peak}


HALF = torch.bfloat16
CASES = {  # method, dtype of the weights, "autocast" | "deepspeed" (all in bfloat16) | "" , attention, dropout
    "moka fp32": ("moka", torch.float32, "", "sdpa", 0.0),
    "moka autocast": ("moka", torch.float32, "autocast", "sdpa", 0.0),
    "moka bf16 autocast": ("moka", HALF, "autocast", "sdpa", 0.0),
    "moka deepspeed bf16": ("moka", torch.float32, "deepspeed", "sdpa", 0.0),
    "moka eager": ("moka", torch.float32, "", "eager", 0.0),
    "moka dropout": ("moka", torch.float32, "", "sdpa", 0.1),
    "lora fp32": ("lora", torch.float32, "", "sdpa", 0.0),
    "hira fp32": ("hira", torch.float32, "", "sdpa", 0.0),
    "full fp32": ("full", torch.float32, "", "sdpa", 0.0),
    "full autocast": ("full", torch.float32, "autocast", "sdpa", 0.0),
    "frozen": ("none", torch.float32, "", "sdpa", 0.0),
}


def prepared(name: str, batch: int, length: int, checkpointing: bool = False, **shape):
    """(LLM, network, setting, whether autocast is on) of a case."""
    method, dtype, mode, attention, dropout = CASES[name]
    llm = build(method, dtype, attention, dropout, **shape)
    if mode == "deepspeed":
        llm = llm.to(HALF)
    if checkpointing:
        checkpoint_activations(llm)
    setting = Setting(
        batch, length, 2 if mode == "deepspeed" else None, bf16=bool(mode), checkpointing=checkpointing,
        answers=ANSWERS, on_cpu=True,
    )  # fmt: skip
    return llm, described(llm, configured(method), attention, dropout > 0), setting, mode == "autocast"


@pytest.mark.parametrize("name", CASES)
def test_activations_are_what_the_backward_pass_keeps(name):
    llm, network, setting, autocast = prepared(name, 2, 96)
    found = measured(llm, 2, 96, autocast)
    log_softmax = network.vocabulary * 2 * 96 * ANSWERS * 4
    activations = memory.activation_bytes(network, setting)
    assert activations + log_softmax == pytest.approx(found["kept"], rel=0.05)
    peak = activations + memory.logit_bytes(network, setting) + memory.working_bytes(network, setting)
    assert peak == pytest.approx(found["peak"], rel=0.15)


@pytest.mark.parametrize(("name", "over"), [("moka fp32", 0.15), ("moka deepspeed bf16", 0.15), ("moka autocast", 0.2)])
def test_checkpointed_activations(name, over):
    """Predicted is more than measured: the logits' gradient is gone by the time a layer is recomputed as a whole."""
    llm, network, setting, autocast = prepared(name, 2, 96, checkpointing=True, num_hidden_layers=6)
    found = measured(llm, 2, 96, autocast)
    peak = memory.activation_bytes(network, setting) + memory.logit_bytes(network, setting)
    assert 0.95 < (peak + memory.working_bytes(network, setting)) / found["peak"] < 1 + over


@pytest.mark.parametrize("name", ["moka fp32", "moka deepspeed bf16"])
def test_logits_of_a_large_vocabulary(name):
    """The forward's peak: under a dispatch mode autograd's index_select makes one copy more than it does else."""
    llm, network, setting, autocast = prepared(name, 2, 96, vocab_size=16_000)
    peak = memory.activation_bytes(network, setting) + memory.logit_bytes(network, setting)
    assert peak == pytest.approx(measured(llm, 2, 96, autocast)["forward"], rel=0.08)


def test_wider_and_longer_at_another_shape():
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 3, "num_attention_heads": 8}
    llm, network, setting, _ = prepared("moka fp32", 3, 200, **shape)
    found = measured(llm, 3, 200, autocast=False)
    peak = memory.activation_bytes(network, setting) + memory.logit_bytes(network, setting)
    assert peak + memory.working_bytes(network, setting) == pytest.approx(found["peak"], rel=0.15)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qformer", {"tokens": 8, "hidden": 96, "heads": 4, "layers": 2}),
        ("mlp", {"stride": 2, "hidden": 128}),
        ("pooled", {"tokens": 8, "hidden": 128}),
        ("perceiver", {"tokens": 8, "hidden": 96, "heads": 4, "layers": 2}),
    ],
)
def test_projectors_keep_what_is_predicted(name, options):
    from mokamm.projectors import build_projector

    segments, patches, width = 12, 50, 80
    projector = build_projector(name, width, 64, True, **options)
    features = torch.randn(segments, patches, width)
    with kept_for_backward({p.untyped_storage()._cdata for p in projector.parameters()}) as kept:
        tokens = projector(features, torch.ones(segments, patches, dtype=torch.bool))
    network = Network(1, 64, 1, 64, 1, 1, media=(Media(segments, tokens.shape[1], projector.kept(patches)),))
    assert memory.media_bytes(network, Setting(1, 1)) == pytest.approx(bytes_of(kept), rel=0.2)


def test_a_forecast_of_a_whole_model(make_model):
    config = configured()
    forecast = Forecast.of(make_model("moka"), config, CPU)
    assert [(m.segments, m.tokens) for m in forecast.network.media] == [(2, 3), (3, 5)]
    assert forecast.memory().encoders > 0
    batch = {"input_ids": torch.zeros(4, 30), "labels": torch.zeros(4, 30), "samples": [None] * 4}
    assert "for its 4 rows of 30 tokens" in forecast.compared([batch])
    packed = {**batch, "samples": [None] * 10_000}
    assert "for its 4 rows of 30 tokens" in forecast.compared([packed])
    assert forecast.compared([packed]) != forecast.compared([batch])  # media of all samples
    assert forecast.memory(batch=8).activations > forecast.memory(batch=4).activations


def shaped(model_type, **shape):
    """A random LLM of that kind, under LoRA where no family refuses it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mokamm.adapters import wrap

    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=50, hidden_size=32, **shape))
    return wrap(llm, "lora", MODALITIES, {"r": 4, "target_modules": r".*(in_proj|up_proj)"})


def test_an_llm_whose_shape_is_not_understood_is_told_in_one_line():
    config = configured("lora")
    config.model.modalities = {}
    forecast = Forecast.of(Stub(shaped("mamba", num_hidden_layers=2)), config, CPU)
    assert forecast.table() == "memory is not predicted for this LLM: the config of 'mamba' has no num_attention_heads"
    batch = {"input_ids": torch.zeros(4, 30), "labels": torch.zeros(4, 30)}
    assert forecast.compared([batch]).endswith("after the first step")
    with (
        pytest.raises(UserError, match=r"memory ran out in training .* A smaller training.per_device_train_batch_size"),
        explained(forecast),
    ):
        raise MemoryError


def test_of_widths_that_differ_by_layer_the_largest_counts():
    config = configured("lora")
    config.model.modalities = {}
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0, 0.0]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_kv_shared_layers": 0}
    small = {"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    llm = shaped("gemma3n_text", intermediate_size=[48, 64], **layers, **heads, **small)
    forecast = Forecast.of(Stub(llm), config, CPU)
    assert forecast.network.intermediate == 64
    assert "plain PyTorch" in forecast.table()


# ---- states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["moka", "full"])
def test_states_of_plain_pytorch_are_exact(method):
    llm = build(method)
    optimizer = torch.optim.AdamW([p for p in llm.parameters() if p.requires_grad])
    for p in llm.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    setting = Setting(1, 8, on_cpu=True)
    found = memory.predict(weights_of(Stub(llm)), described(llm, configured(method)), setting)
    assert found.frozen == sum(p.nbytes for p in llm.parameters() if not p.requires_grad)
    assert found.trained == found.gradients == sum(p.nbytes for p in llm.parameters() if p.requires_grad)
    assert found.optimizer == sum(t.nbytes for t in moments)


@pytest.mark.parametrize("method", ["moka", "lora", "lori_d"])
def test_a_quantized_outline_is_counted_as_it_will_be(method):
    """By hand: a byte for each weight of a block's Linear layers, all else as it is; adapters are not quantized."""
    llm = build(method, HALF, device="meta")
    own = [(name, p) for name, p in llm.named_parameters() if not p.requires_grad]
    packed = sum(p.numel() for name, p in own if name.endswith("proj.base_layer.weight"))
    assert packed > 0
    rest = [p for name, p in own if not name.endswith("proj.base_layer.weight")]
    network = described(llm, configured(method))
    for quantization, each in (("8bit", 1), ("4bit", 0.5 + 1 / 64 + 1 / 4096)):
        weights = weights_of(Stub(llm), quantization)
        plain, cast = Setting(1, 8), Setting(1, 8, bf16=True, stage=2)  # what DeepSpeed casts are floats
        found = [memory.predict(weights, network, setting).frozen for setting in (plain, cast)]
        expected = [sum(p.nbytes for p in rest), sum(2 * p.numel() for p in rest)]
        assert found == pytest.approx([packed * each + other for other in expected], rel=1e-9)


def test_llama_2_7b_on_the_meta_device_by_stage():
    """Nothing is loaded; the numbers of the ZeRO paper's table, for frozen and trained weights apart."""
    shape = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}
    llm = build("moka", HALF, device="meta", **shape, num_attention_heads=32, num_key_value_heads=32)
    weights, network = weights_of(Stub(llm)), described(llm, configured())
    frozen, adapters = 6_738_415_616, 32 * (4 * (3 * 4 * 4096 + 4 * 4096) + 3 * 4 * 4096 * 2 + 3 * 4 * 11_008)
    adapters += 32 * (2 * 4 * 11_008 + 4 * 4096)
    assert {w.part: w.elements for w in weights} == {"llm": frozen, "adapter": adapters}
    eight = Setting(4, 1024, ranks=8, bf16=True, bucket=adapters)
    by_stage = {s: memory.predict(weights, network, memory.replace(eight, stage=s)) for s in (0, 1, 2, 3)}
    assert [found.frozen for found in by_stage.values()] == [2 * frozen] * 3 + [2 * frozen / 8]
    assert [found.gradients for found in by_stage.values()] == [2 * adapters] * 2 + [2 * adapters / 8] * 2
    assert [found.optimizer for found in by_stage.values()] == [12 * adapters] + [12 * adapters / 8] * 3
    offloaded = memory.replace(eight, stage=3, offload_optimizer=True, offload_parameters=True)
    found = memory.predict(weights, network, offloaded)
    assert (found.frozen, found.trained, found.gradients, found.optimizer) == (0, 0, 0, 0)
    assert found.host == pytest.approx((2 * frozen + 16 * adapters) / 8)


# ---- advice --------------------------------------------------------------------------------------------------------


def forecast_of(config: RunConfig, layers=32, vocabulary=32_000, device="cuda", world=2) -> Forecast:
    """A 7B-like LLM under a config, on GPUs that need not be there."""
    weights = (Weights("llm", 6_700_000_000, 2, False), Weights("adapter", 30_000_000, 4, True))
    network = Network(
        layers, 4096, 32, 128, 11_008, vocabulary, rank=4, linears=7,
        inputs=6 * 4096 + 11_008, distinct_inputs=2 * 4096 + 11_008, weight_bytes=2, linear_elements=6_600_000_000,
    )  # fmt: skip
    ranks = Ranks(0, 0, world, torch.device(device), grouped=False)
    return Forecast(weights, network, setting_of(config, ranks, 30_000_000), config, capacity=24 * 2.0**30)


def write(folder: Path, config: RunConfig) -> Path:
    config.dump(folder / "config.yaml")
    return folder / "config.yaml"


def saved_gb(line: str) -> float:
    number, unit = line.rpartition("-")[2].split()
    return float(number) / (1 if unit == "GB" else 1024)


@pytest.mark.parametrize(
    "training",
    [
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "deepspeed": "configs/deepspeed/zero2.json"},
        {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 1},
    ],
)
def test_what_is_advised_can_be_typed_and_saves_what_it_says(training, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configured(**training)
    before = forecast_of(config)
    lines = before.advice()
    assert len(lines) == (2 if config.training.per_device_train_batch_size == 1 else 3)
    savings = [saved_gb(line) for line in lines]
    assert savings == sorted(savings, reverse=True)
    for line, promised in zip(lines, savings, strict=True):
        typed = shlex.split(line.rpartition("-")[0])
        after = forecast_of(load_config(write(tmp_path, config), typed))
        assert (before.total() - after.total()) / 2**30 == pytest.approx(promised, abs=0.02), line


def test_the_greatest_saving_depends_on_the_run():
    narrow = forecast_of(configured(bf16=True, gradient_checkpointing=True), vocabulary=32_000)
    wide = forecast_of(
        configured(bf16=True, gradient_checkpointing=True, deepspeed="configs/deepspeed/zero3.json"), vocabulary=256_000
    )
    assert "zero3_offload" in narrow.advice()[0]  # the frozen weights are the most
    assert "per_device_train_batch_size=2 training.gradient_accumulation_steps=2" in "".join(
        wide.advice()
    )  # the logits
    assert "gradient_checkpointing" in forecast_of(configured(bf16=True), layers=200).advice()[0]


def test_in_a_validation_its_own_batch_size_is_advised():
    config = configured(bf16=True, per_device_eval_batch_size=64)
    advised = "".join(forecast_of(config, vocabulary=256_000).advice(validating=True))
    assert "per_device_eval_batch_size=32" in advised
    assert "train_batch_size" not in advised
    assert "checkpointing" not in advised  # nothing is kept for a backward pass
    with pytest.raises(UserError) as error, explained(forecast_of(config, vocabulary=256_000), validating=True):
        raise MemoryError
    assert "Predicted for 64 rows" in str(error.value)
    assert "stay usable with training.per_device_eval_batch_size" in str(error.value)


def test_a_full_run_without_deepspeed_is_not_told_to_take_16_bit_weights():
    def advised(method):
        return "".join(typed for typed, _ in forecast_of(configured(method))._changes(4, False))

    assert "bfloat16" in advised("lora")
    assert "bfloat16" not in advised("full")


def test_on_one_cpu_process_no_sharding_or_offloading_is_advised():
    assert "deepspeed" not in "".join(forecast_of(configured(), device="cpu", world=1).advice())


def test_the_table_has_every_stage_and_marks_the_chosen(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = forecast_of(configured(bf16=True, deepspeed="configs/deepspeed/zero2.json")).table().splitlines()
    assert [line[2:8] for line in lines[2:6]] == ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert [line[0] for line in lines[2:6]] == [" ", " ", ">", " "]
    plain = forecast_of(configured(bf16=True)).table()
    assert "> plain PyTorch" in plain
    assert "more than the 24.00 GB there are" not in plain or "training." in plain


# ---- out of memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_ran_out(error, expected):
    assert is_out_of_memory(error) is expected


STARVED = """
import resource, sys
from mokamm import train
from mokamm.training.forecast import Forecast

told = Forecast.table

def limited(self):  # the last thing before the first step
    with open("/proc/self/status") as file:
        held = next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + 300 * 2**20,) * 2)
    return told(self)

Forecast.table = limited
train.main(sys.argv[1:])
"""


def test_a_real_lack_of_memory_is_told_with_three_settings(mini_base, tmp_path):
    """A limit on the data of a real process, and rows of text that need more in the first forward."""
    row = {"role": "user", "content": [{"type": "text", "text": "where is the red circle now " * 60}]}
    row = {"messages": [row, {"role": "assistant", "content": "left"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 64)
    (tmp_path / "config.yaml").write_text(
        json.dumps(
            {
                "model": {"llm": {"path": str(mini_base / "llm")}},
                "data": {"train": [{"source": "messages", "path": str(tmp_path / "rows.jsonl")}], "max_length": 1000},
                "training": {
                    "output_dir": str(tmp_path / "run"),
                    "per_device_train_batch_size": 64,
                    "max_steps": 1,
                    "dataloader_num_workers": 0,
                    "use_cpu": True,
                    "report_to": [],
                },
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-c", STARVED, str(tmp_path / "config.yaml")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "predicted memory of each process" in done.stdout
    assert "error: memory ran out in training" in done.stderr
    assert "Traceback" not in done.stderr
    advised = [
        line for line in done.stderr.splitlines() if line.startswith("  training.") or line.startswith("  data.")
    ]
    assert len(advised) == 3
    assert any("per_device_train_batch_size=32 training.gradient_accumulation_steps=2" in line for line in advised)
