"""Going on with a changed configuration: bit-identical by design, or refused with the reason. No setting is neither."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.schema import UserError
from mokamm.config import RunConfig
from mokamm.config_sections import TrainingConfig
from mokamm.training import checkpoint
from mokamm.training.resume import SAME, common
from mokamm.training.stream import plan
from mokamm.training.watch import forget_after, read_metrics

ROOT = Path(__file__).resolve().parents[2]
FREE = {  # settings that may change in the middle of a run, and what they are changed to below
    "logging_steps": 3, "logging_first_step": True, "eval_steps": 1, "eval_strategy": "steps", "save_steps": 1,
    "save_strategy": "no", "save_total_limit": 1, "dataloader_num_workers": 2,
    "load_best_model_at_end": False, "report_to": ["tensorboard"], "per_device_eval_batch_size": 3,
    "gradient_checkpointing": True, "on_nan": "skip", "loss_spike": 1e6, "ddp_timeout": 900,
}  # fmt: skip
IN_THE_PLAN = {
    "per_device_train_batch_size": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "max_steps": "total steps",
    "num_train_epochs": "total steps",
    "deepspeed": "training.deepspeed",
    "use_cpu": "device",
}
ABOUT_THE_FOLDER = {"output_dir", "resume_from_checkpoint"}


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """An uninterrupted run, and one that was interrupted at step 6, two beyond its checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    toy.run(folder / "whole", toy.alone(), dropout=0.2)
    toy.run(folder / "interrupted", toy.alone(), dropout=0.2, stop_after=6)
    return folder


def test_every_setting_of_the_training_is_either_free_or_compared():
    """Whoever adds one must decide: put it into resume.SAME, or among FREE with a proof that no loss changes."""
    groups = (set(SAME), set(FREE), set(IN_THE_PLAN), ABOUT_THE_FOLDER)
    settings = [name for name, field in TrainingConfig.model_fields.items() if not field.exclude]  # have one value
    assert set.union(*groups) == set(settings)
    assert sum(map(len, groups)) == len(settings)


@pytest.mark.parametrize("setting", FREE)
def test_a_free_setting_changes_no_loss_that_follows(toy, whole, tmp_path, setting):
    run = Path(shutil.copytree(whole / "interrupted", tmp_path / "run"))
    toy.run(run, toy.alone(), dropout=0.2, **{setting: FREE[setting]})
    last = (folder / "checkpoint-8" for folder in (run, whole / "whole"))
    ours, theirs = ((f / "adapter" / "adapter_model.safetensors").read_bytes() for f in last)
    assert ours == theirs
    if setting != "logging_steps":
        assert toy.losses(run) == toy.losses(whole / "whole")


def test_a_log_line_that_spans_the_interruption_is_the_same(toy, tmp_path):
    often = {"dropout": 0.2, "logging_steps": 3, "save_steps": 2, "eval_steps": 8}
    toy.run(tmp_path / "whole", toy.alone(), **often)
    toy.run(tmp_path / "halved", toy.alone(), stop_after=5, **often)
    toy.run(tmp_path / "halved", toy.alone(), **often)
    assert toy.losses(tmp_path / "halved") == toy.losses(tmp_path / "whole")


def settings(toy, folder, **sections) -> RunConfig:
    tree = toy.config(folder).to_dict()
    for name, values in sections.items():
        tree[name] |= values
    tree["model"]["llm"] = {"path": "toy", **tree["model"]["llm"]}
    return RunConfig.model_validate(tree)


def interrupted(toy, folder, shape=(8, 2, 2, 1, 1.0, -1), **sections) -> None:
    state = {"step": 1, "same": common(settings(toy, folder, **sections), plan(*shape))}
    (folder / checkpoint.STATE).write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((8, 2, 2, 2, 1.0, -1), "ranks: 1 there, 2 now"),
        ((8, 1, 2, 1, 1.0, -1), "training.per_device_train_batch_size: 2 there, 1 now"),
        ((8, 2, 1, 1, 1.0, -1), "training.gradient_accumulation_steps: 2 there, 1 now"),
        ((9, 2, 2, 1, 1.0, -1), "rows: 8 there, 9 now"),
        ((8, 2, 2, 1, 2.0, -1), "total steps (of training.num_train_epochs or training.max_steps): 2 there, 4 now"),
    ],
)
def test_other_ranks_batches_or_steps_are_refused(toy, tmp_path, shape, reason):
    interrupted(toy, tmp_path)
    with pytest.raises(UserError) as error:
        checkpoint.read_state(tmp_path, common(settings(toy, tmp_path), plan(*shape)))
    assert f"  - {reason}\n" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model": {"llm": {"path": "toy", "dtype": "bfloat16"}}},
            "model.llm.dtype: 'float32' there, 'bfloat16' now\n",
        ),
        ({"model": {"llm": {"path": "another"}}}, "the base's weights: 'toy' there, 'another' now"),
        ({"training": {"metric_for_best_model": "loss"}}, "training.metric_for_best_model: 'accuracy' there"),
        ({"data": {"validation": [{"source": "messages", "path": "toy.jsonl"}]}}, "data.validation: "),
        ({"data": {"allow_outside": True}}, "data.allow_outside: False there, True now"),
        ({"data": {"limits": {"max_seconds": 5.0}}}, "data.limits.max_seconds: 3600.0 there, 5.0 now\n"),
        ({"adapter": {"r": 8}}, "adapter.r: 4 there, 8 now\n"),
        ({"adapter": {"method": "lora"}}, "adapter.method: 'moka' there, 'lora' now\n"),
    ],
)
def test_another_base_data_or_method_is_refused(toy, tmp_path, changes, reason):
    interrupted(toy, tmp_path)
    with pytest.raises(UserError) as error:
        checkpoint.read_state(tmp_path, common(settings(toy, tmp_path, **changes), plan(8, 2, 2, 1, 1.0, -1)))
    assert f"  - {reason}" in str(error.value)


def test_files_of_the_same_name_with_other_content_are_refused(toy, tmp_path):
    rows, deepspeed = tmp_path / "rows.jsonl", tmp_path / "zero.json"
    rows.write_text('{"a": 1}\n')
    deepspeed.write_text('{"zero_optimization": {"stage": 2}}')
    named = {
        "data": {"train": [{"source": "messages", "path": str(rows)}]},
        "training": {"deepspeed": str(deepspeed)},
    }
    interrupted(toy, tmp_path, **named)

    def read():
        return checkpoint.read_state(tmp_path, common(settings(toy, tmp_path, **named), plan(8, 2, 2, 1, 1.0, -1)))

    assert read().step == 1
    rows.write_text('{"a": 2}\n')
    with pytest.raises(UserError, match=r"data\.train: .*sha256"):
        read()
    rows.write_text('{"a": 1}\n')
    deepspeed.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(UserError, match=r"the DeepSpeed JSON\.zero_optimization\.stage: 2 there, 3 now"):
        read()


def test_an_annotation_file_may_move_and_a_hub_name_may_not_change(toy, tmp_path):
    def named(path) -> dict:
        return {"data": {"train": [{"source": "messages", "path": str(path)}]}}

    def read(path):
        return checkpoint.read_state(
            tmp_path, common(settings(toy, tmp_path, **named(path)), plan(8, 2, 2, 1, 1.0, -1))
        )

    here, there = tmp_path / "rows.jsonl", tmp_path / "moved.jsonl"
    here.write_text('{"a": 1}\n')
    interrupted(toy, tmp_path, **named(here))
    here.rename(there)
    assert read(there).step == 1
    interrupted(toy, tmp_path, **named("hub/one"))
    with pytest.raises(UserError, match=r"data\.train: "):
        read("hub/two")


def test_another_device_is_refused(toy, whole, tmp_path):
    run = Path(shutil.copytree(whole / "interrupted", tmp_path / "run"))
    state = json.loads((run / "checkpoint-4" / checkpoint.STATE).read_text())
    with pytest.raises(UserError, match="device: 'cpu' there, 'cuda' now"):
        checkpoint.read_state(run / "checkpoint-4", {**state["same"], "device": "cuda"})


def test_a_best_checkpoint_that_was_never_saved_is_not_looked_for(toy, tmp_path):
    """Without load_best_model_at_end the best so far may be a step that no checkpoint has."""
    often = {"eval_steps": 1, "save_steps": 5}
    toy.run(tmp_path, toy.alone(), stop_after=5, load_best_model_at_end=False, **often)
    _, best = toy.run(tmp_path, toy.alone(), **often)
    assert best.is_dir()
    assert checkpoint.write_final(tmp_path, best).is_dir()


def test_metrics_have_each_step_once_after_a_crash(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": kind, "step": step}) for step in range(1, 7) for kind in ("train", "validation")]
    path.write_text("\n".join(lines) + "\n" + '{"kind": "train", "step": 7, "lo' + "\0\0")
    assert len(read_metrics(path)) == 12  # a reader of the interrupted run
    forget_after(path, 4)
    with open(path, "a") as file:  # what the resumed run writes
        file.write(json.dumps({"kind": "train", "step": 5}) + "\n")
    found = [(record["kind"], record["step"]) for record in read_metrics(path)]
    assert found == [(kind, step) for step in range(1, 5) for kind in ("train", "validation")] + [("train", 5)]
    assert path.read_text().count("\n") == 9
