"""Samples that share rows: the loss, the gradients and the routing of the padded batch, or a refusal."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

from data.collate import collate, share_rows
from data.schema import IGNORED, PADDING, Example, Message, Sample, Text, UserError
from mokamm import train
from mokamm.adapters import AdapterError, MokaConfig
from mokamm.model import MultimodalLM
from mokamm.perception import Perception
from mokamm.routing import Routing
from mokamm.training.packing import check_apart
from mokamm.training.watch import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def samples(make_sample):
    history = (Message("user", (Text("Which?"),)), Message("assistant", (Text("two"),)))
    return [
        make_sample(("video", "clip.mp4"), ("audio", "long.wav"), "How many are sounding? " * 8),
        make_sample("Only text here?", answer="yes"),
        make_sample(("audio", "short.wav"), "Which one?", ("image", "wide.png"), ("image", "picture.png"), answer="no"),
        make_sample(("audio", "short.wav"), answer="a violin", history=history),
    ]


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    out = model(batch)
    (out["loss_sum"] / out["tokens"]).backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return float(out["loss_sum"].detach()), int(out["tokens"]), gradients


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("method", ["moka", "multi_lora", "lori_moka_d", "lora", "dora", "hira", "full", "none"])
def test_loss_and_gradients_are_those_of_the_padded_batch(make_model, samples, method, one_row):
    model = make_model(method).train()
    examples = [model.processor(sample) for sample in samples]
    batch = share_rows(examples, model.processor.pad_id, one_row)
    assert len(batch["input_ids"]) == (1 if one_row else 2)
    loss, tokens, gradients = loss_and_gradients(model, batch)
    expected_loss, expected_tokens, expected = loss_and_gradients(model, collate(examples, model.processor.pad_id))
    assert tokens == expected_tokens > 0
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert set(gradients) == set(expected)
    for name, value in expected.items():
        assert (gradients[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


@pytest.mark.parametrize("one_row", [False, True])
def test_rows_hold_every_token_once_and_no_label_at_a_first_token(make_model, samples, one_row):
    model = make_model()
    examples = [model.processor(sample) for sample in samples]
    for number, example in enumerate(examples):
        example.sample.meta["number"] = number
    examples[1].labels[0] = examples[1].input_ids[0]  # as for a model of text without a prompt
    batch = share_rows(examples, model.processor.pad_id, one_row)
    rows = len(batch["input_ids"])
    assert batch["input_ids"].numel() < collate(examples, 0)["input_ids"].numel()
    found = iter(batch["samples"])
    seen = []
    for b in range(rows):
        ids = batch["sample_ids"][b].tolist()
        assert ids == sorted(ids)
        for sample_id in sorted({i for i, real in zip(ids, batch["attention_mask"][b], strict=True) if real}):
            number = next(found).meta["number"]
            seen.append(number)
            here, example = batch["sample_ids"][b] == sample_id, examples[number]
            for name in ("input_ids", "modality_ids", "key_mask"):
                assert torch.equal(batch[name][b][here], getattr(example, name)), name
            assert torch.equal(batch["labels"][b][here][1:], example.labels[1:])
            assert batch["labels"][b][here][0] == IGNORED
            assert batch["position_ids"][b][here].tolist() == list(range(len(example.input_ids)))
    assert sorted(seen) == [0, 1, 2, 3]
    assert all(example.media[0].start < len(example.input_ids) for example in examples if example.media)  # as it was
    with pytest.raises(ValueError, match="at least one example"):
        share_rows([], 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_rows_are_no_longer_than_the_longest_sample_and_no_more_than_needed(lengths):
    def example(n):
        ids = torch.arange(n)
        return Example(ids, ids.clone(), torch.zeros_like(ids), torch.zeros_like(ids).bool(), [], Sample(str(n), ()))

    batch = share_rows([example(n) for n in lengths], 0)
    rows, width = batch["input_ids"].shape
    assert width == max(lengths)
    assert int(batch["attention_mask"].sum()) == sum(lengths)
    assert rows == 1 or 2 * sum(lengths) > rows * width  # first fit: at most one row less than half full
    assert sorted(int(sample.id) for sample in batch["samples"]) == sorted(lengths)


SWITCHES = [
    {}, {"scale_logits": False}, {"logits_by_keys": True}, {"shared_b": False}, {"attention_weight": 0.0},
    {"attention_weight": 0.5, "frozen_a": True},
]  # fmt: skip


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: " ".join(switches) or "default")
@pytest.mark.parametrize("path", ["fast", "plain", "folded"])
def test_media_attend_to_their_own_samples_keys_alone(switches, path, monkeypatch):
    """Each sample by itself is the reference; one has no key, one no media, one stands twice, padding is at the end."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"proj": nn.Linear(6, 5)}).double()
    model = get_peft_model(holder, MokaConfig(r=3, lora_alpha=5, target_modules=["proj"], **switches))
    layer = model.base_model.model["proj"]
    for parameter in (*layer.moka_A.parameters(), *layer.moka_B.parameters()):
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    kinds = [[0, 1, 1, 0, 2, 0], [2, 1, 0], [0, 0], [1, 0, 2, 0, 0]]
    keys = [[0, 0, 0, 1, 0, 1], [0, 0, 0], [0, 1], [0, 1, 0, 0, 1]]
    xs = [torch.randn(1, len(kind), 6, dtype=torch.float64) for kind in kinds]
    if path == "plain":
        monkeypatch.setattr(type(layer), "_can_be_fast", lambda *_: False)
    if path == "folded":
        model.eval()
        model.base_model.fold_text()

    def output(x, modality_ids, key_mask, sample_ids=None):
        routing = Routing(torch.tensor([modality_ids]), torch.tensor([key_mask]).bool(), sample_ids=sample_ids)
        model.base_model.set_routing(routing)
        return layer(x)[0]

    expected = torch.cat([output(x, *sample) for x, *sample in zip(xs, kinds, keys, strict=True)])
    row = torch.cat([*xs, torch.randn(1, 2, 6, dtype=torch.float64)], dim=1)
    number = torch.tensor([[i for i, kind in enumerate(kinds) for _ in kind] + [len(kinds)] * 2])
    ids, mask = [*chain(*kinds), PADDING, PADDING], [*chain(*keys), 0, 0]
    together = output(row, ids, mask, number)
    torch.testing.assert_close(together[:-2], expected, rtol=1e-10, atol=1e-12)
    if switches.get("attention_weight", 1.0):
        mixed = output(row, ids, mask)
        assert not torch.allclose(mixed[:-2], expected, atol=1e-3)


def test_sample_ids_of_another_shape_are_refused():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(
        AdapterError, match=r"sample_ids must be integers of modality_ids' shape \(2, 5\); found \(5,\)"
    ):
        Routing(ids, ids.bool(), sample_ids=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(AdapterError, match="float32"):
        Routing(ids, ids.bool(), sample_ids=torch.zeros(2, 5))


def llm_of(kind: str) -> MultimodalLM:
    """A random LLM of a family, without adapter, projectors and encoders."""
    torch.manual_seed(0)
    more = {
        "Qwen3": HEADS, "Mistral": {**HEADS, "sliding_window": 4}, "Gemma3Text": {**HEADS, "sliding_window": 4},
        "Qwen3Moe": {**HEADS, **EXPERTS}, "Mamba": {"state_size": 4},
        "Phi3": {"pad_token_id": 0},
        # weights so small that little leaks
        "Lfm2": {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2, "initializer_range": 0.02},
        "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "GptOss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
        "Qwen3Next": {
            **HEADS, **EXPERTS, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    }.get(kind, {})  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, "initializer_range": 0.2, **more})
    llm = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if kind == "Bloom" else None
    )
    processor = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=64), end_ids=[], senses={}, pad_id=0)
    return MultimodalLM(llm, {}, Perception({}, None), processor)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral", "Gemma3Text", "Phi3", "GPT2", "GPTNeoX", "Qwen3Moe"])
def test_llms_that_keep_samples_apart_are_taken(kind):
    model = llm_of(kind)
    check_apart(model, model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Mamba", "takes position_ids"),
        ("Bloom", "takes position_ids"),
        ("Qwen3Next", "does not keep the samples"),
        ("OPT", "does not keep the samples"),
        ("Falcon", "does not keep the samples"),
        ("GptOss", "does not keep the samples"),
        ("Lfm2", "does not keep the samples"),
    ],
)
def test_llms_that_do_not_are_refused(kind, message):
    model = llm_of(kind)
    with pytest.raises(UserError, match=f"(?s)packing.*{message}.*group_by_length"):
        check_apart(model, model)


def test_a_run_gives_the_losses_of_the_padded_run_and_resumes_only_as_it_began(mini_base, world, tmp_path, capsys):
    told = (world / "train" / "told.jsonl").read_text().splitlines()[:24]
    short = [
        json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]})
        for n in range(24)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([*told, *short]))

    def arguments(name, packing, *more):
        return [
            str(ROOT / "configs/mini/text.yaml"), "data.world=null", f"data.train.0.path={rows}",
            f"data.validation.0.path={rows}", "evaluation.benchmarks=[]", f"training.output_dir={tmp_path / name}",
            "training.deepspeed=null", "training.max_steps=4", "training.logging_steps=1", "training.eval_steps=4",
            "training.per_device_train_batch_size=8", "training.dataloader_num_workers=1", "training.report_to=none",
            "training.save_steps=2", "training.use_cpu=true", f"training.packing={json.dumps(packing)}", *more,
        ]  # fmt: skip

    found, padding = {}, {}
    for name, packing in (("packed", True), ("padded", False)):
        train.main(arguments(name, packing))
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        found[name] = [r["loss"] for r in records if r["kind"] in ("train", "validation")]
        padding[name] = sum(r["padding_share"] for r in records if r["kind"] == "train")
    assert found["packed"] == pytest.approx(found["padded"], rel=1e-4)
    assert padding["packed"] < padding["padded"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(arguments("packed", False, "training.max_steps=6"))
    assert "training.packing: True there, False now" in capsys.readouterr().err
