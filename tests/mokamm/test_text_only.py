"""Text-only instruction tuning through the real commands, and adapters that do not belong to the run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data.schema import UserError
from mokamm import infer, train
from mokamm.adapters import set_routing, wrap
from mokamm.config import load_config
from mokamm.init_from import load_init
from mokamm.routing import Routing
from mokamm.training.watch import read_metrics
from mokamm.weights import WeightsError, load_weights, save_weights

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def arguments(world: Path, out: Path, *overrides: str) -> list[str]:
    told = {split: world / split / "told.jsonl" for split in ("train", "test")}
    return [
        str(ROOT / "configs/mini/text.yaml"), "data.world=null", f"data.train.0.path={told['train']}",
        f"data.validation.0.path={told['test']}", "evaluation.benchmarks=[]", f"training.output_dir={out}",
        "training.deepspeed=null", "training.max_steps=3", "training.logging_steps=1", "training.eval_steps=3",
        "training.per_device_train_batch_size=4", "training.dataloader_num_workers=0", "training.report_to=none",
        "training.save_steps=2", "training.use_cpu=true", *overrides,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(mini_base, world, tmp_path_factory) -> dict[str, Path]:
    """The text recipe, three steps of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "moka"):
        train.main(arguments(world, folder / method, f"adapter.method={method}"))
    return {method: folder / method for method in ("lora", "moka")}


@pytest.mark.parametrize("method", ["lora", "moka"])
def test_it_trains_evaluates_and_infers(runs, world, capfd, method):
    from eval.run import main as evaluate

    run = runs[method]
    found = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in found] == [1, 2, 3]
    assert found[-1]["loss"] < found[0]["loss"]
    capfd.readouterr()
    told = world / "test" / "told.jsonl"
    assert evaluate(["miniworld_told", str(run), "--path", str(told), "--limit", "4", "--json"]) == 0
    metrics = json.loads(capfd.readouterr().out)
    assert (metrics["rows"], metrics["bad"]) == (4, 0)
    words = ["miniworld_told", str(run), "--path", str(told), "--limit", "4", "--json", "--control"]
    assert evaluate([*words, "base"]) == 0  # the plain LLM: a run of text alone has no projectors to go back to
    assert json.loads(capfd.readouterr().out)["control"] == "base"
    assert evaluate([*words, "blind"]) == 2
    assert "the run is of text alone, there are no media to take away" in capfd.readouterr().err
    infer.main([str(run), "a red circle on the left. drum. Where is the circle?", "--json"])
    assert json.loads(capfd.readouterr().out)["answer"]
    with pytest.raises(SystemExit):
        infer.main([str(run), "What is this?", "--image", str(told)])
    assert "this run has no modality 'vision'; it was trained with: text only" in capfd.readouterr().err


def test_auto_is_resolved_and_a_resumed_run_may_say_it_or_the_number(runs, world, capfd):
    run = runs["lora"]
    assert load_config(run / "config.yaml").training.learning_rate == 4.68e-3  # 15 times: under 100 steps; width 192
    capfd.readouterr()
    for rate in ("auto", "4.68e-3"):
        train.main(arguments(world, run, "adapter.method=lora", f"training.learning_rate={rate}"))
        out, _ = capfd.readouterr()
        assert f"resuming from {run / 'checkpoint-3'}" in out
        assert out.count("learning_rate: auto = 0.00468 (5e-5 * 15 * (2000 / 192)^0.781, 3 steps)") == (rate == "auto")
    train_again = arguments(world, run, "adapter.method=lora")
    for override, named in (
        ("training.learning_rate=4.7e-3", "training.learning_rate: 0.00468 there, 0.0047 now"),
        ("adapter.method=moka", "adapter.method: 'lora' there, 'moka' now"),
        ("adapter.r=8", "adapter.r: 4 there, 8 now"),
    ):
        with pytest.raises(SystemExit) as end:
            train.main([*train_again, override])
        assert end.value.code == 2
        error = capfd.readouterr().err
        assert f"checkpoint-3 comes from another run than the one configured:\n  - {named}\n" in error
        assert "Traceback" not in error


def test_an_unknown_modality_stops_before_the_first_step(mini_base, world, tmp_path, capfd):
    spoken = f"data.train.0.path={world / 'train' / 'spoken.jsonl'}"
    with pytest.raises(SystemExit) as end:
        train.main(arguments(world, tmp_path / "run", spoken))
    assert end.value.code == 2
    assert "unknown modality 'speech'" in capfd.readouterr().err
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_moka_with_one_modality_is_lora():
    """The same factors give the same logits and gradients, with keys marked and without."""
    lora, moka = (wrap(small_llm(), method, ["text"], {"r": 3, "lora_alpha": 6}) for method in ("lora", "moka"))
    assert [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (lora, moka)] == [1488, 1488]
    factors = {n: p for n, p in lora.named_parameters() if "lora_" in n}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in factors.values():
            parameter.normal_(std=0.3)
        for name, parameter in moka.named_parameters():
            if "moka_" in name:
                parameter.copy_(factors[name.replace("moka_", "lora_")])
    lora(input_ids=IDS, labels=IDS).loss.backward()
    for keys in (torch.zeros_like(IDS).bool(), IDS > 5):
        moka.zero_grad()
        set_routing(moka, Routing(torch.zeros_like(IDS), keys))
        moka(input_ids=IDS, labels=IDS).loss.backward()
        for name, parameter in moka.named_parameters():
            if "moka_" in name:
                expected = factors[name.replace("moka_", "lora_")].grad
                torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-12)


# ---- adapters of another run -----------------------------------------------------------------------------------------


def small_llm(**changes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=37, **{**shape, **changes})).double()


class Model(nn.Module):
    """As much of a MultimodalLM as saving and loading read."""

    def __init__(self, method: str, modalities: list[str], shape: dict | None = None, r: int = 4) -> None:
        super().__init__()
        self.llm = wrap(small_llm(**(shape or {})), method, modalities, {"r": r})
        self.llm.peft_config["default"].base_model_name_or_path = "some/llm"
        self.projectors, self.processor = nn.ModuleDict(), SimpleNamespace(tokenizer=None)


@pytest.fixture
def saved(tmp_path) -> Path:
    save_weights(Model("moka", ["text", "vision"]), tmp_path / "final")
    return tmp_path


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("lora", ["text"], 4), "peft_type: MOKA there, LORA in the configuration (adapter.method)"),
        (("moka", ["text", "vision"], 8), "r: 4 there, 8 in the configuration (adapter.r)"),
        (
            ("moka", ["text", "audio"], 4),
            "modalities: ['text', 'vision'] there, ['text', 'audio'] in the configuration (model.modalities)",
        ),
        (
            ("multi_lora", ["text", "vision"], 4),
            "shared_b: True there, False in the configuration (adapter.shared_b)",
        ),
    ],
    ids=["method", "rank", "modalities", "shared_b"],
)
def test_beginning_from_another_adapter_is_refused(saved, other, named):
    method, modalities, r = other
    with pytest.raises(WeightsError) as error:
        load_init(Model(method, modalities, r=r), saved)
    assert str(error.value) == (
        f"training.init_from: {saved / 'final' / 'adapter'} holds an adapter of other settings:\n  - {named}"
    )


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"hidden_size": 32}, "moka_A.weight has the shape (8, 16), the model's is (8, 32)"),
        ({"num_hidden_layers": 3}, "missing: base_model.model.model.layers.2."),
        ({"num_hidden_layers": 1}, "unexpected: base_model.model.model.layers.1."),
    ],
)
def test_an_adapter_of_another_llm_is_refused(saved, shape, named):
    for load in (load_init, lambda model, folder: load_weights(model, folder / "final")):
        with pytest.raises(UserError) as error:
            load(Model("moka", ["text", "vision"], shape), saved)
        assert "(made for the LLM 'some/llm') does not fit this LLM" in str(error.value)
        assert named in str(error.value)


def test_an_adapter_of_a_newer_version_is_refused(saved):
    load_init(Model("moka", ["text", "vision"]), saved)
    path = saved / "final" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unused": None, "temperature": 0.5}))
    with pytest.raises(WeightsError, match=r"temperature: 0\.5 there, a setting that this version does not know"):
        load_init(Model("moka", ["text", "vision"]), saved)
