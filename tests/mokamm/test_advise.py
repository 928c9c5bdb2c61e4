"""`mokamm advise`: its figures against real models and real rows, what it warns of, and how it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from data.schema import UserError
from mokamm import advise, information
from mokamm.adapters.masks import keep_top
from mokamm.adapters.start import factors
from mokamm.config import load_config

ROOT = Path(__file__).resolve().parents[2]
TEXT, QUICK = (str(ROOT / "configs" / name) for name in ("text/instruct.yaml", "quickstart.yaml"))
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
TINY = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mini_base) -> Path:
    """LLMs of which only the shapes are there: llama3 (with a tokenizer), bare (without), moe."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    folder = tmp_path_factory.mktemp("shapes")
    LlamaConfig(**LLAMA_3_8B).save_pretrained(folder / "llama3")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(mini_base / "llm" / name, folder / "llama3")
    LlamaConfig(**TINY).save_pretrained(folder / "bare")
    Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, num_key_value_heads=2).save_pretrained(folder / "moe")
    return folder


def text(folder: Path, llm: str, world: Path, *overrides: str) -> list[str]:
    """Arguments for the text recipe on one of the folder's LLMs and the miniature world's text rows."""
    rows = world / "train" / "told.jsonl"
    return [TEXT, f"model.llm.path={folder / llm}", f"data.train.0.path={rows}", *overrides]


def outline_of(folder: Path, world: Path, method: str, *overrides: str):
    from mokamm.outline import build_outline

    path, *settings = text(folder, "bare", world, f"adapter.method={method}", *overrides)
    return build_outline(load_config(path, settings))


def advised(capsys, *arguments: str) -> dict:
    """Standard output of --json, which must be one JSON object."""
    capsys.readouterr()
    advise.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_llama_3_8b_without_its_weights(capsys, folder, world):
    found = advised(capsys, *text(folder, "llama3", world, "training.max_steps=1000", "adapter.r=32"), "--gpu-gb", "80")
    assert found["learning_rate"]["recommended"] == 2.86e-4
    assert found["parameters"]["trained"] == {"adapter": 83_886_080}  # FACTS: LoRA, r 32
    assert found["parameters"]["llm"] == 8_030_261_248
    assert found["targets"]["adapted"] == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 32
    )
    assert (found["targets"]["missed"], found["targets"]["attention_only"]) == ([], False)
    assert found["rank"]["capacity_bits"] == 2 * 83_886_080
    assert found["rank"]["needed"] == 1
    assert found["steps"] == {"total": 1000, "warmup": 30}
    assert found["memory"]["chosen"] == "ZeRO-2"
    assert found["memory"]["bytes"]["ZeRO-2"]["frozen"] == 2 * 8_030_261_248
    assert found["memory"]["capacity"] == 80 * 2**30
    assert 0.75 < found["compute"]["share_of_full"] < 0.77
    plain = text(folder, "llama3", world, "training.gradient_checkpointing=false", "adapter.r=1")
    assert advised(capsys, *plain)["compute"]["share_of_full"] == pytest.approx(2 / 3, rel=1e-3)
    base, wide = 8_030_261_248 - 128256 * 4096 - 65 * 4096, 16 * 83_886_080  # what multiplies: no embeddings, no norms
    share = advised(capsys, *plain, "adapter.r=512")["compute"]["share_of_full"]
    assert share == pytest.approx((4 * base + 6 * wide) / (6 * base), rel=1e-12)


@pytest.mark.parametrize(("method", "trained"), [("lori_d", 44_040_192), ("lori_s", 4_404_019)])
def test_a_frozen_a_is_not_counted_as_the_llm_s(capsys, folder, world, method, trained):
    """FACTS: LoRI-D trains 0.548 % of Llama-3-8B at r 32, LoRI-S 0.055 %."""
    settings = (f"adapter.method={method}", "adapter.r=32")
    found = advised(capsys, *text(folder, "llama3", world, *settings))["parameters"]
    assert (found["trained"], found["llm"]) == ({"adapter": trained}, 8_030_261_248)


def test_the_outline_counts_what_the_real_model_has(mini_base, world):
    """Quickstart, all modalities: the memory of every stage, predicted without and with the LLM's weights."""
    from mokamm.build import build_model
    from mokamm.outline import build_outline
    from mokamm.training.forecast import network_of, weights_of

    config = load_config(QUICK, [f"data.media_dir={world / 'train'}", "data.cache=null", "training.init_from=null"])
    outline, model = build_outline(config), build_model(config, "cpu", for_training=True)
    assert outline.left_out == {}
    assert all(p.is_meta for p in outline.parameters())
    assert sorted(map(repr, weights_of(outline))) == sorted(map(repr, weights_of(model)))
    assert network_of(outline, config) == network_of(model, config)
    assert len(network_of(model, config).media) == 3

    # and its answers are as long as they really become: in rows with and without media
    for name in ("spoken", "told", "images"):
        rows = list(information.open_source("messages", world / "train" / f"{name}.jsonl", limit=4))
        for row in rows:
            labels = model.processor(row).labels
            assert outline.processor.answer_length(row) == int((labels != -100).sum()), row


def test_answers_are_counted_or_sampled(monkeypatch, mini_base, world):
    from mokamm.outline import build_outline

    path = world / "train" / "told.jsonl"
    overrides = [f"model.llm.path={mini_base / 'llm'}", f"data.train.0.path={path}"]
    config = load_config(TEXT, overrides)
    processor = build_outline(config).processor
    lengths = [processor.answer_length(row) for row in information.open_source("messages", path)]
    whole = information.count_answers(config, processor)
    assert (whole.rows, whole.distinct, whole.tokens, whole.exact) == (16, 16, sum(lengths), True)
    assert whole.bits(nats=2.0) == pytest.approx(sum(lengths) * 2 / 0.693147, rel=1e-5)
    config.data.train[0].weight = 2.5  # repeats are rows to train on, but teach nothing new
    repeated = information.count_answers(config, processor)
    assert (repeated.rows, repeated.distinct, repeated.tokens) == (40, 16, sum(lengths))
    config.training.num_train_epochs = 1
    config.data.train[0].weight = 0.5
    assert information.count_answers(config, processor).tokens == pytest.approx(sum(lengths) / 2)
    config.training.num_train_epochs = 2  # which take the other half too
    assert information.count_answers(config, processor).tokens == sum(lengths)
    config.data.train.append(config.data.train[0].model_copy(update={"weight": 1.0}))  # two files of one name
    assert information.count_answers(config, processor).rows == 8 + 16
    config.data.train.pop()
    config.data.train[0].weight = 1.0
    monkeypatch.setattr(information, "SAMPLE", 4)
    sampled = information.count_answers(config, processor)
    assert (sampled.read, sampled.exact, sampled.distinct) == (4, False, 16)
    assert sampled.tokens == 4 * sum(lengths[::4])


def test_the_rank_that_holds_the_answers():
    assert information.rank_for(bits=8000, parameters=4000, rank=4) == 4
    assert information.rank_for(bits=8001, parameters=4000, rank=4) == 5
    assert information.rank_for(bits=0, parameters=4000, rank=4) == 1


def test_what_it_warns_of(capsys, folder, world):
    settings = (
        "adapter.method=moka", "adapter.target_modules=[q_proj, v_proj]", "adapter.lora_alpha=16",
        "training.learning_rate=1e-4", "training.per_device_train_batch_size=64", "training.warmup_ratio=0",
    )  # fmt: skip
    advise.main([*text(folder, "llama3", world, *settings), "--nats", "1e9"])
    out = " ".join(capsys.readouterr().out.split())
    for expected in (
        "training.learning_rate is 0.0001, 4.3 times below it",
        "not calibrated: fitted to LoRA; for moka",
        "not calibrated: fitted with alpha 32, here it is 16",
        "warning: attention alone; left out: k_proj, o_proj, gate_proj, up_proj, down_proj",
        "too small: adapter.r=",
        "32 (the papers of MokA and LoRI) would be safer",
        "training.warmup_ratio=0.03 (MokA's paper) is gentler",
    ):
        assert expected in out, expected


def test_what_is_not_there_is_said_and_the_rest_is_told(capsys, folder, world):
    found = advised(capsys, TEXT, f"model.llm.path={folder / 'bare'}")
    assert found["rank"]["answer_tokens"] is None
    assert found["steps"] == {"total": None, "warmup": None}
    assert found["parameters"]["trained"]["adapter"] > 0
    advise.main([TEXT, f"model.llm.path={folder / 'bare'}"])
    out = " ".join(capsys.readouterr().out.split())
    assert "the answers were not counted: see steps" in out
    assert "not known, since not all rows are here data.train.0: datasets/instruct/train.jsonl: the annotation" in out
    found = advised(capsys, *text(folder, "bare", world))
    assert found["rank"]["answer_tokens"] is None
    assert found["parameters"]["left_out"] == {}
    advise.main(text(folder, "bare", world))
    assert "has no tokenizer that can be read" in " ".join(capsys.readouterr().out.split())
    assert found["steps"]["total"] == 1

    absent = "model.modalities.vision.encoder.path=openai/clip-vit-large-patch14"
    found = advised(capsys, QUICK, absent, "data.world=null", f"data.media_dir={world / 'train'}")
    assert "not in a local folder (openai/clip" in found["parameters"]["left_out"]["vision"]
    assert found["parameters"]["trained"]["projector"] > 0  # of sound and speech
    assert found["rank"]["answer_tokens"] > 0  # the rows' text is there all the same


def test_experts(capsys, folder, world):
    found = advised(capsys, *text(folder, "moe", world))
    assert found["targets"]["attention_only"]
    assert found["targets"]["missed"] == ["experts.down_proj", "experts.gate_up_proj"]
    for names in ("experts.gate_up_proj, experts.down_proj", "mlp.experts.gate_up_proj, down_proj"):
        more = advised(capsys, *text(folder, "moe", world, f"adapter.target_parameters=[{names}]"))
        assert (more["targets"]["missed"], more["targets"]["attention_only"]) == ([], False)
    assert more["parameters"]["trained"]["adapter"] > found["parameters"]["trained"]["adapter"]


def test_memory_that_cannot_be_predicted_hides_nothing_else(capsys, folder, world):
    from transformers import RwkvConfig

    from mokamm import doctor

    RwkvConfig(vocab_size=600, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64).save_pretrained(
        folder / "rwkv"
    )
    arguments = text(folder, "rwkv", world, "adapter.r=1", "model.llm.attention=eager")
    found = advised(capsys, *arguments)
    assert found["memory"]["bytes"] == {}
    assert 0.6 < found["compute"]["share_of_full"] < 1
    for command in (advise, doctor):
        if command is doctor:
            with pytest.raises(SystemExit) as end:
                doctor.main([*arguments, "--shapes"])
            assert end.value.code == 0
        else:
            advise.main(arguments)
        assert "memory is not predicted for this LLM: the config of 'rwkv' has no num_" in capsys.readouterr().out


def test_other_methods(capsys, world, mini_base):
    told = f"data.train.0.path={world / 'train' / 'told.jsonl'}"
    arguments = [TEXT, f"model.llm.path={mini_base / 'llm'}", told, "training.learning_rate=1e-4"]
    found = advised(capsys, *arguments, "adapter.method=full")
    assert found["parameters"]["trained"] == {"llm": found["parameters"]["llm"]}
    assert "* 1 *" in found["learning_rate"]["formula"]
    found = advised(capsys, *arguments, "training.stage=1")
    assert found["learning_rate"]["recommended"] is None
    assert found["parameters"]["trained"] == {}


@pytest.mark.parametrize(("method", "dense"), [("lori_s", "lori_d"), ("lori_moka_s", "lori_moka_d")])
def test_a_sparse_method_is_counted_as_it_will_be_cut(capsys, folder, world, tmp_path, method, dense):
    from mokamm.lori_mask import write_mask

    def trained(*overrides: str) -> int:
        return advised(capsys, *text(folder, "bare", world, *overrides))["parameters"]["trained"]["adapter"]

    whole = trained(f"adapter.method={dense}")
    assert trained(f"adapter.method={method}") == round(0.1 * whole)
    assert trained(f"adapter.method={method}", "adapter.sparsity=0.75") == round(0.25 * whole)

    shapes = {name: B.size for name, (_, B) in factors(outline_of(folder, world, method).llm).items()}
    mask = keep_top(
        shapes, lambda name: torch.arange(1.0, 1 + shapes[name][0] * shapes[name][1]).view(shapes[name]), 0.6
    )
    write_mask(mask, tmp_path / "mask.safetensors")
    named = f"adapter.mask={tmp_path / 'mask.safetensors'}"
    assert trained(f"adapter.method={method}", named) == mask.kept == round(0.4 * whole)
    assert trained(f"adapter.method={method}", named, "adapter.sparsity=0.6") == mask.kept
    with pytest.raises(UserError, match=r"adapter.sparsity is 0.9, and adapter.mask .* has 0.6: leave sparsity out"):
        outline_of(folder, world, method, named, "adapter.sparsity=0.9")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "no such configuration file"),
        ([TEXT, "adapter.r=0"], "adapter.r (override)"),
        ([TEXT, "model.llm.path=/nowhere/at/all"], "model.llm.path: AutoConfig cannot load '/nowhere/at/all'"),
        ([TEXT, "model.llm.path=BARE", "adapter.target_modules=[q_prj]"], "did you mean 'q_proj'?"),
        ([TEXT, "--ranks", "0"], "--ranks: must be a whole number of at least 1; found 0"),
        ([TEXT, "--gpu-gb", "nan"], "--gpu-gb: must be a number above 0; found nan"),
    ],
)
def test_mistakes_are_told_in_one_message(capsys, folder, arguments, message):
    with pytest.raises(SystemExit) as end:
        advise.main([argument.replace("BARE", str(folder / "bare")) for argument in arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_lora_begins_as_in_the_source():
    """W + (alpha/r) B A: A uniform within +-1/sqrt(d_in), B zero; PEFT's own layer, as method lora sets it up."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mokamm.adapters import wrap

    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**{**TINY, "hidden_size": 400, "num_hidden_layers": 1}))
    model = wrap(llm, "lora", ["text"], {"r": 64, "lora_alpha": 32})
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bound = 1 / 400**0.5
    assert not B.any()
    assert 0.999 * bound < A.abs().max() <= bound
    quarters = torch.histc(A.detach(), bins=4, min=-bound, max=bound) / A.numel()
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), rtol=0, atol=0.01)
    nn.init.normal_(B)
    x = torch.randn(3, 400)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + (32 / 64) * x @ A.T @ B.T, rtol=1e-5, atol=1e-4)
