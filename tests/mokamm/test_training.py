"""The engine and the loop, on a small real model: exact token mean, schedule, order of rows, validation, ranks."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from data.collate import collate
from data.ledger import Ledger
from data.schema import IGNORED, BadSample, UserError
from mokamm.config_sections import TrainingConfig
from mokamm.training.corpus import HeldOut, batches
from mokamm.training.engine import PlainEngine, deepspeed_config
from mokamm.training.launch import Ranks, plain_environment
from mokamm.training.loop import better
from mokamm.training.optimization import moving, parameter_groups, schedule, warmup_steps
from mokamm.training.stream import MicroBatches, ValidationBatches, plan
from mokamm.training.validation import validate
from mokamm.training.watch import read_metrics

SCRIPT = Path(__file__).with_name("toy_training.py")
ROOT = SCRIPT.parents[2]


def training(**values) -> TrainingConfig:
    return TrainingConfig(output_dir="runs/x", **values)


# ---- loss ----------------------------------------------------------------------------------------------------------


def token_mean_in_float64(model, rows) -> torch.Tensor:
    """Every sample alone, in float64, without the engine, the collator or the model's own loss."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in rows:
        batch = collate([example], 0)
        logits = model({**batch, "labels": batch["labels"]})["logits"][0]
        for position in range(1, len(example.input_ids)):
            if example.labels[position] != IGNORED:
                total = total - logits[position - 1].log_softmax(-1)[example.labels[position]]
                tokens += 1
    return total / tokens


def test_loss_and_gradient_are_the_mean_over_answer_tokens_of_the_whole_step(toy, tmp_path):
    _, best = toy.run(tmp_path, toy.alone(), max_steps=1, gradient_accumulation_steps=3, max_grad_norm=0.0)
    record = read_metrics(tmp_path / "metrics.jsonl")[0]

    model = toy.build().double()
    dataset = toy.corpus(tmp_path).train
    shape = plan(len(dataset), 2, 3, 1, 1.0, 1)
    rows = [dataset[i] for batch in MicroBatches(shape, seed=0, rank=0) for i in batch]
    lengths = [int((row.labels != IGNORED).sum()) for row in rows]
    assert len(rows) == 6
    assert max(lengths) > 5 * min(lengths)  # else a mean of means would look the same
    loss = token_mean_in_float64(model, rows)
    loss.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.requires_grad))
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert best == tmp_path / "checkpoint-1"


def test_training_learns_and_every_record_is_whole(toy, tmp_path):
    _, best = toy.run(tmp_path, toy.alone(), max_steps=24, eval_steps=8, save_steps=24, report_to=["tensorboard"])
    records = read_metrics(tmp_path / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "validation"]
    assert [r["step"] for r in train] == list(range(1, 25))
    assert [r["step"] for r in validation] == [8, 16, 24]
    assert train[-1]["loss"] < train[0]["loss"]
    assert train[5]["learning_rate"]["adapter"] == pytest.approx(10 * train[5]["learning_rate"]["projector"])
    assert all(r["tokens_per_second"] > 0 and 0 <= r["padding_share"] < 1 for r in train)
    assert train[-1]["epoch"] == pytest.approx(24 * 4 / 22, abs=1e-3)
    assert list((tmp_path / "tensorboard").iterdir())
    chosen = max(validation, key=lambda r: (r["accuracy"], -r["loss"]))
    assert best.name == f"checkpoint-{chosen['step']}"


def test_gradient_checkpointing_leaves_losses_alone(toy, tmp_path):
    toy.run(tmp_path / "a", toy.alone(), max_steps=2)
    toy.run(tmp_path / "b", toy.alone(), max_steps=2, gradient_checkpointing=True)
    assert toy.losses(tmp_path / "a") == pytest.approx(toy.losses(tmp_path / "b"), rel=1e-6)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_agree_with_one_and_resume_bit_identically(toy, two_ranks, tmp_path, stage):
    found = json.loads((two_ranks / f"{stage}.json").read_text())
    assert found["ranks"] == 2
    assert found["alive"] == 0 or stage == "zero3"  # models of the five runs, though DeepSpeed has seen them
    toy.run(tmp_path, toy.alone(), max_steps=5, **toy.FROM_STEP_ONE)
    assert len(found["exact"]) == len(found["whole"]) == 5
    assert len(set(found["exact"])) == 5
    assert found["exact"] == pytest.approx(toy.losses(tmp_path), rel=1e-5)
    toy.run(tmp_path / "coto", toy.alone(), adapter={"coto": {"p0": 0.2}}, max_steps=5, **toy.FROM_STEP_ONE)
    assert found["coto"] == pytest.approx(toy.losses(tmp_path / "coto"), rel=1e-5)
    assert found["coto"][1:] != pytest.approx(found["exact"][1:], rel=1e-3)
    assert found["halved"] == found["whole"]  # dropout draws differ by rank and go on where they stopped
    assert found["whole"][0] == found["exact"][0]  # LoRA's B is still zero: dropout has nothing to act on
    assert all(a != b for a, b in zip(found["whole"][1:], found["exact"][1:], strict=True))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One launch of two processes without a compiler, for all the tests that need one."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false", "OMP_NUM_THREADS": "1"}
    launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_gpus", "2", "--master_port", str(20000 + os.getpid() % 20000)]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), "zero2", "zero3"],
        env={**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


# ---- rows of a step ------------------------------------------------------------------------------------------------


def test_ranks_and_accumulation_share_the_rows_of_one_rank():
    one = list(MicroBatches(plan(10, 4, 1, 1, 2.0, -1), 3, 0))
    by_rank = [list(MicroBatches(plan(10, 1, 2, 2, 2.0, -1), 3, rank)) for rank in (0, 1)]
    for step, rows in enumerate(one):
        shared = [row for rank in by_rank for micro in rank[2 * step : 2 * step + 2] for row in micro]
        assert sorted(shared) == sorted(rows)


def test_an_epoch_has_every_row_once_also_where_steps_straddle_epochs():
    shape = plan(rows=10, batch=3, accumulation=1, world=1, epochs=3, max_steps=-1)
    rows = [row for batch in MicroBatches(shape, 0, 0) for row in batch]
    assert shape.total_steps == 10
    for epoch in range(3):
        assert sorted(rows[10 * epoch : 10 * epoch + 10]) == list(range(10 * epoch, 10 * epoch + 10))
    assert rows[:10] != [row - 10 for row in rows[10:20]]
    assert [step for step in range(1, 11) if shape.ends_epoch(step)] == [4, 7, 10]


def test_a_later_start_sees_the_same_rows():
    shape = plan(7, 2, 2, 1, 4.0, -1)
    assert list(MicroBatches(shape, 5, 0, first_step=3)) == list(MicroBatches(shape, 5, 0))[6:]


def padding(batches: list[list[int]], length) -> float:
    places = sum(len(rows) * max(map(length, rows)) for rows in batches)
    return 1 - sum(length(row) for rows in batches for row in rows) / places


def test_grouping_by_length_takes_the_same_rows_saves_most_padding_and_keeps_lengths_mixed_over_time():
    def length(row: int) -> int:
        return (row * 7919) % 311 + 10

    shape = plan(rows=1000, batch=8, accumulation=2, world=1, epochs=2.0, max_steps=-1)
    drawn, grouped = list(MicroBatches(shape, 4, 0)), list(MicroBatches(shape, 4, 0, length=length))
    block = 64 * 2  # micro batches
    assert len(drawn) == len(grouped) == 2 * shape.total_steps
    for first in range(0, len(drawn), block):
        one, other = (sorted(chain.from_iterable(order[first : first + block])) for order in (drawn, grouped))
        assert one == other
    assert padding(grouped, length) < 0.2 * padding(drawn, length)
    means = [sum(map(length, rows)) / 8 for rows in grouped[:block]]
    assert abs(sum(means[: block // 2]) - sum(means[block // 2 :])) < 0.1 * sum(means)  # no sorting from short to long
    assert list(MicroBatches(shape, 4, 0, first_step=70, length=length)) == grouped[140:]  # in the middle of a block


def test_ranks_share_the_grouped_rows_of_one_rank_and_have_like_lengths_at_one_moment():
    def length(row: int) -> int:
        return (row * 7919) % 311

    one = list(MicroBatches(plan(300, 4, 1, 1, 1.0, -1), 3, 0, length=length))
    ranks = [list(MicroBatches(plan(300, 2, 1, 2, 1.0, -1), 3, rank, length=length)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one


def test_validation_rows_are_shared_out_once():
    samplers = [ValidationBatches(7, 2, rank, 2) for rank in (0, 1)]
    assert [len(s) for s in samplers] == [2, 2]
    real = [batch[: s.real(i)] for s in samplers for i, batch in enumerate(s)]
    assert sorted(row for batch in real for row in batch) == list(range(7))


# ---- validation ----------------------------------------------------------------------------------------------------


def test_validation_counts_every_sample_once(toy, tmp_path):
    model = toy.build()
    engine = PlainEngine(model, parameter_groups(training(), toy.parts_of(model)), training(), toy.alone())
    examples = [toy.encode(sample) for sample in toy.samples(5)]
    with torch.no_grad():  # answers that are the model's own, for three of the five
        for example in examples[:3]:
            for t in range(1, len(example.input_ids)):
                if example.labels[t] != IGNORED:
                    ids = {**collate([example], 0)}
                    best = int(model(ids)["logits"][0, t - 1].argmax())
                    example.input_ids[t] = example.labels[t] = best
    shards = []
    for rank in (0, 1):
        rows = ValidationBatches(5, 2, rank, 2)
        loader = [collate([examples[i] for i in batch], 0) for batch in rows]
        shards.append((validate(engine, loader, rows, toy.alone()), rows))
    counted = sum(found["samples"] for found, _ in shards)
    right = sum(found["accuracy"] * found["samples"] for found, _ in shards)
    assert counted == 5
    assert right == pytest.approx(sum(_right(model, e) for e in examples))
    assert right >= 3

    rows = ValidationBatches(5, 2, 0, 1)
    found = validate(engine, [collate([examples[i] for i in batch], 0) for batch in rows], rows, toy.alone())
    with torch.no_grad():
        expected = token_mean_in_float64(copy.deepcopy(model).double(), examples)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert model.training


def test_a_bad_validation_row_is_wrong_and_missing_whatever_takes_its_place(toy, tmp_path):
    def encode(sample):
        if sample.id == "1":
            raise BadSample("the clip is cut off")
        return toy.encode(sample)

    ledger = Ledger(tmp_path / "bad_samples.jsonl", 0.5, 4)
    held_out = HeldOut([(toy.samples(4), 1.0, "validation/toy")], encode, ledger)
    with pytest.raises(UserError, match=r"data\.validation: the sources' names must differ"):
        HeldOut([(toy.samples(4), 1.0, "a"), (toy.samples(4), 1.0, "a")], encode, ledger)
    model, rows = toy.build(), ValidationBatches(4, 2, 0, 1)
    engine = PlainEngine(model, parameter_groups(training(), toy.parts_of(model)), training(), toy.alone())
    found = validate(engine, batches(held_out, rows, 0, 0), rows, toy.alone())
    good = [toy.encode(sample) for sample in toy.samples(4) if sample.id != "1"]
    with torch.no_grad():
        expected = token_mean_in_float64(copy.deepcopy(model).double(), good)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["accuracy"] == sum(_right(model, example) for example in good) / 4
    assert (found["samples"], found["missing"]) == (4, 1)
    assert json.loads((tmp_path / "bad_samples.jsonl").read_text())["reason"] == "the clip is cut off"


def _right(model, example) -> bool:
    with torch.no_grad():
        best = model(collate([example], 0))["logits"][0].argmax(-1)
    where = [t for t in range(1, len(example.labels)) if example.labels[t] != IGNORED]
    return all(best[t - 1] == example.labels[t] for t in where)


def test_the_better_checkpoint():
    old = {"loss": 1.0, "accuracy": 0.5}
    assert better(old, None, "loss")
    assert better({"loss": 2.0, "accuracy": 0.6}, old, "accuracy")
    assert not better({"loss": 2.0, "accuracy": 0.6}, old, "loss")
    assert better({"loss": 0.9, "accuracy": 0.5}, old, "accuracy")
    assert not better(old, old, "accuracy")


# ---- rates ---------------------------------------------------------------------------------------------------------


def test_cosine_with_warm_up():
    factor = schedule(training(lr_scheduler_type="cosine", warmup_ratio=0.1), 100)
    assert [factor(0), factor(5), factor(10)] == pytest.approx([0.0, 0.5, 1.0])
    assert factor(55) == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert factor(100) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"warmup_ratio": 0.03}, 4), ({"warmup_steps": 0.03}, 4), ({"warmup_steps": 7}, 7), ({}, 0),
        ({"warmup_ratio": 1.0}, 101), ({"warmup_ratio": 0.5, "warmup_steps": 7}, 7),
    ],
)  # fmt: skip
def test_warm_up_steps(values, expected):
    assert warmup_steps(training(**values), 101) == expected


def test_constant_and_linear():
    assert schedule(training(lr_scheduler_type="constant"), 10)(7) == 1.0
    assert schedule(training(lr_scheduler_type="linear"), 10)(5) == pytest.approx(0.5)
    warmed = schedule(training(lr_scheduler_type="constant_with_warmup", warmup_steps=4), 10)
    assert [warmed(step) for step in (0, 1, 3, 4, 9)] == pytest.approx([0.0, 0.25, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("constant", {}), ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {"power": 2.0, "lr_end": 1e-5}), ("inverse_sqrt", {}),
        ("cosine_with_min_lr", {"min_lr": 2e-5}), ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_warmup_with_min_lr", {"min_lr": 2e-5}), ("warmup_stable_decay", {"num_decay_steps": 5}),
    ],
)  # fmt: skip
def test_every_curve_is_the_one_of_transformers(kind, options):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=3e-4)
    reference = get_scheduler(kind, optimizer, 4, 20, options)
    factor = schedule(
        training(learning_rate=3e-4, lr_scheduler_type=kind, lr_scheduler_kwargs=options, warmup_steps=4), 20
    )
    for step in range(20):
        assert 3e-4 * factor(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(("kind", "options"), [("polynomial", {"powr": 2}), ("warmup_stable_decay", None)])
def test_options_that_a_curve_does_not_take_are_told(kind, options):
    with pytest.raises(UserError, match=f"lr_scheduler_kwargs do not fit training.lr_scheduler_type '{kind}'"):
        schedule(training(lr_scheduler_type=kind, lr_scheduler_kwargs=options), 20)


@pytest.mark.parametrize(
    ("settings", "validated", "saved", "logged"),
    [
        ({"eval_strategy": "no", "save_strategy": "no"}, [], [8], [4, 8]),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [6, 8], [6, 8], [4, 8]),
        ({"eval_steps": 0.3, "save_steps": 0.5, "logging_steps": 0.4}, [3, 6, 8], [4, 8], [4, 8]),
        ({"logging_first_step": True, "eval_steps": 4}, [4, 8], [4, 8], [1, 4, 8]),
    ],
)
def test_strategies_and_shares_of_all_steps(toy, tmp_path, settings, validated, saved, logged):
    toy.run(tmp_path, toy.alone(), **{"logging_steps": 4, "load_best_model_at_end": False, **settings})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "validation"] == validated
    assert [r["step"] for r in records if r["kind"] == "train"] == logged
    assert sorted(int(f.name.partition("-")[2]) for f in tmp_path.glob("checkpoint-*")) == saved


def test_parts_have_their_own_rates_and_zero_freezes(toy):
    parts = toy.parts_of(toy.build())
    groups = parameter_groups(training(projector_learning_rate=5e-4, weight_decay=0.1), parts)
    assert {(g["part"], g["base_lr"]) for g in groups} == {("projector", 5e-4), ("adapter", 1e-4)}
    assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])
    sparse = {"adapter": [("llm.x.lori_B.default.values", torch.nn.Parameter(torch.ones(5)))]}
    assert [g["weight_decay"] for g in parameter_groups(training(weight_decay=0.1), sparse)] == [0.1]
    still = training(projector_learning_rate=0.0)
    assert set(moving(still, parts)) == {"adapter"}
    groups = parameter_groups(still, parts)
    assert {g["part"] for g in groups} == {"adapter"}
    assert not any(p.requires_grad for _, p in parts["projector"])
    with pytest.raises(UserError, match="nothing to train"):
        parameter_groups(training(projector_learning_rate=0.0), {"projector": parts["projector"]})


# ---- DeepSpeed's JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload"])
def test_auto_entries_are_filled(name):
    settings = training(deepspeed=f"configs/deepspeed/{name}.json", gradient_accumulation_steps=3, bf16=True)
    filled = deepspeed_config(settings, Ranks(0, 0, 2, torch.device("cpu"), True), trained=1234)
    assert "auto" not in json.dumps(filled)
    assert filled["train_batch_size"] == 4 * 3 * 2
    assert filled["gradient_clipping"] == 1.0
    assert filled["bf16"] == {"enabled": True}
    assert filled["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in filled["zero_optimization"]) == name.endswith("offload")


def test_deepspeed_json_that_contradicts_the_configuration(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(
        '{"train_micro_batch_size_per_gpu": 9, "zero_optimization": {"stage": 2, "sub_group_size": "auto"}}'
    )
    with pytest.raises(UserError) as error:
        deepspeed_config(training(deepspeed=str(path)), Ranks(0, 0, 1, torch.device("cpu"), True), 10)
    assert "train_micro_batch_size_per_gpu' is 9" in str(error.value)
    assert "sub_group_size" in str(error.value)
    path.write_text('{"optimizer": {"type": "Adam"}}')
    with pytest.raises(UserError, match="'optimizer' is set there"):
        deepspeed_config(training(deepspeed=str(path)), Ranks(0, 0, 1, torch.device("cpu"), True), 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": {"enabled": True}}, "'fp16.enabled' is true"),
        ({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype"),
    ],
)
def test_precisions_that_do_not_work_are_refused(settings, message, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        deepspeed_config(training(deepspeed=str(path)), Ranks(0, 0, 1, torch.device("cpu"), True), 10)


def test_a_process_of_its_own_gets_the_users_threads_not_torchruns(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert plain_environment()["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not {"OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"} & set(plain_environment())
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert plain_environment()["OMP_NUM_THREADS"] == "3"
