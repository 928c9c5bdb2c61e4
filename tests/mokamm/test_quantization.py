"""A base in 4 and 8 bits: what is refused without any GPU, and, where bitsandbytes is installed, a whole small run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch

from data.schema import UserError
from mokamm import doctor
from mokamm.build import build_model
from mokamm.config import ConfigError, load_config
from mokamm.config_sections import LLMConfig
from mokamm.quantization import check_trainable, quantized

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "configs/mini/text.yaml")
STAGE1 = ["training.stage=1", "training.learning_rate=1e-4"]
installed = importlib.util.find_spec("bitsandbytes") is not None
needs_it = pytest.mark.skipif(not installed, reason="needs bitsandbytes: uv sync --extra quantization")


@pytest.mark.parametrize("method", ["hira", "full"])
def test_methods_that_need_the_weights_are_refused(method) -> None:
    with pytest.raises(
        ConfigError, match=f"quantization is 4bit, and method '{method}' (multiplies|trains) the weights"
    ):
        load_config(TEXT, ["model.llm.quantization=4bit", f"adapter.method={method}"])
    load_config(TEXT, ["model.llm.quantization=4bit", f"adapter.method={method}", *STAGE1])


def test_an_unknown_kind_is_told() -> None:
    with pytest.raises(ConfigError, match="input should be '4bit' or '8bit'; found '3bit'"):
        load_config(TEXT, ["model.llm.quantization=3bit"])


def test_zero_3_is_refused_and_others_are_not() -> None:
    for stage in (1, 2, 3):
        override = f"training.deepspeed={ROOT}/configs/deepspeed/zero{stage}.json"
        config = load_config(TEXT, ["model.llm.quantization=8bit", override])
        if stage < 3:
            check_trainable(config)
            continue
        with pytest.raises(UserError, match="is ZeRO-3, which cannot shard an LLM in 8bit"):
            build_model(config, "cpu", for_training=True)


def test_doctor_does_not_offer_what_is_refused() -> None:
    arguments = [f"training.deepspeed={ROOT}/configs/deepspeed/zero2.json"]
    plain = doctor.dry_run(load_config(TEXT, arguments), ranks=2, gpu_gb=8)["memory"]
    found = doctor.dry_run(load_config(TEXT, [*arguments, "model.llm.quantization=4bit"]), ranks=2, gpu_gb=8)["memory"]
    assert list(plain) == [*found, "zero3", "zero3_offload"]
    assert all(found[stage]["frozen"] < plain[stage]["frozen"] for stage in found)
    sharded = [f"training.deepspeed={ROOT}/configs/deepspeed/zero3.json", "model.llm.quantization=4bit"]
    with pytest.raises(UserError, match="is ZeRO-3, which cannot shard an LLM in 4bit"):
        doctor.dry_run(load_config(TEXT, sharded), ranks=2, gpu_gb=8)


def test_a_run_that_has_moved_is_not_asked_for_its_deepspeed_json(monkeypatch) -> None:
    """What a model answers does not depend on how its training was sharded."""
    config = load_config(TEXT, ["training.deepspeed=/elsewhere/zero2.json"])
    config.model.llm.quantization = "4bit"
    monkeypatch.setattr("mokamm.build.quantized", lambda llm, device: {})
    assert build_model(config, "cpu").config is config


def test_a_missing_package_is_named(monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(UserError, match="needs the package bitsandbytes: uv sync --extra quantization"):
        quantized(LLMConfig(path="x", quantization="4bit"), torch.device("cpu"))
    assert quantized(LLMConfig(path="x"), torch.device("cpu")) == {}
    with pytest.raises(SystemExit):
        doctor.main([TEXT, "model.llm.quantization=4bit", "training.use_cpu=true", "--json"])
    found = {f["what"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert not found["bitsandbytes"]["there"]
    assert found["bitsandbytes"]["fix"] == "uv sync --extra quantization"


# ---- where bitsandbytes is -------------------------------------------------------------------------------------------


def arguments(world: Path, out: Path, kind: str, *overrides: str) -> list[str]:
    values = {
        "max_steps": 4, "logging_steps": 1, "eval_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4,
        "dataloader_num_workers": 0, "report_to": "none", "deepspeed": "null", "use_cpu": "true", "output_dir": out,
        "bf16": "true",
    }  # fmt: skip
    told = world / "train" / "told.jsonl"
    return [
        TEXT, "data.world=null", f"data.train.0.path={told}", f"data.validation.0.path={world / 'test' / 'told.jsonl'}",
        "evaluation.benchmarks=[]", f"model.llm.quantization={kind}", "model.llm.dtype=bfloat16",
        *(f"training.{key}={value}" for key, value in values.items()), *overrides,
    ]  # fmt: skip


@needs_it
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("method", ["moka", "lora"])
def test_it_trains_reloads_and_answers(kind, method, world, tmp_path, capsys) -> None:
    from mokamm import infer, train
    from mokamm.adapters import AdapterError
    from mokamm.model import MultimodalLM
    from mokamm.training.watch import read_metrics

    run = tmp_path / "run"
    train.main(arguments(world, run, kind, f"adapter.method={method}", "training.learning_rate=5e-3"))
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    assert losses[-1] < losses[0]
    model = MultimodalLM.from_run(run)
    weight = next(m for n, m in model.llm.named_modules() if n.endswith("up_proj.base_layer")).weight
    assert weight.dtype == {"4bit": torch.uint8, "8bit": torch.int8}[kind]
    if method == "moka":
        with pytest.raises(AdapterError, match="quantized or sharded"):
            model.llm.base_model.fold_text()
        with pytest.raises(AdapterError, match="merge"):
            model.llm.merge_and_unload()
    capsys.readouterr()
    answers = []
    for _ in range(2):
        infer.main([str(run), "a red circle on the left. drum. Where is the circle?", "--json"])
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1] != ""


@needs_it
def test_moka_s_gradients_are_those_over_the_dequantized_weights(mini_base) -> None:
    """The same adapter over a plain LLM that holds what the 4-bit weights mean, in float32."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    from mokamm.adapters import set_routing, wrap
    from mokamm.routing import Routing

    path = mini_base / "llm"
    four = quantized(LLMConfig(path=str(path), quantization="4bit"), torch.device("cpu"))
    found, weights = [], {}
    for options in (four, {}):
        llm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
        if not options:
            for name, module in llm.named_modules():
                if name in weights:
                    module.weight.data = weights[name]
        else:
            layers = {n: m for n, m in llm.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
            weights = {n: dequantize_4bit(m.weight.data, m.weight.quant_state).float() for n, m in layers.items()}
            assert len(weights) == 5 * 7
        model = wrap(llm, "moka", ["text", "vision"], {"r": 4}).train()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "moka_" in name:
                parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        ids = torch.randint(6, 500, (2, 12), generator=generator)
        modality = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]] * 2)
        keys = torch.zeros(2, 12, dtype=torch.bool)
        keys[:, 5:9] = True
        set_routing(model, Routing(modality, keys))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if "moka_" in n}))
    (loss, gradients), (expected, reference) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-3, atol=1e-5)


@needs_it
def test_under_zero_2_through_the_launcher(world, tmp_path) -> None:
    from mokamm.training.watch import read_metrics
    from tests.ranks.cases import environment, free_port

    run = tmp_path / "run"
    overrides = [f"training.deepspeed={ROOT}/configs/deepspeed/zero2.json", "training.max_steps=2"]
    command = ["deepspeed", "--num_gpus", "1", "--master_port", free_port(), str(ROOT / "mokamm/train.py")]
    command += arguments(world, run, "4bit", "adapter.method=moka", *overrides)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]) == 2
