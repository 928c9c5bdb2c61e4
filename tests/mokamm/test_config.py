"""Configurations: all mistakes in one message, with key, line and nearest name; overrides; defaults; round trip."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml

from data.schema import UserError
from mokamm.config import ConfigError, RunConfig, load_config
from mokamm.quantization import check_trainable

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
model:
  llm: {path: some/llm}
  modalities:
    vision: {encoder: {name: open_clip, path: p, layer: -2}, projector: {name: qformer, tokens: 4}, segments: 10}
    audio: {encoder: {name: beats, path: p}, segments: 10, seconds: 1.0}
adapter: {method: moka, r: 4}
data:
  train: [{source: music_avqa, path: train.json, options: {video_dir: videos}}]
training:
  output_dir: runs/x
  learning_rate: 1e-4
"""


@pytest.fixture
def write(tmp_path):
    def _write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return _write


def test_values_defaults_and_options(write):
    config = load_config(write(GOOD))
    assert config.model.modality_names == ["text", "vision", "audio"]
    assert config.model.modalities["vision"].encoder.options == {"layer": -2}
    assert config.model.modalities["vision"].projector.options == {"tokens": 4}
    assert config.model.modalities["audio"].projector.name == "qformer"
    assert config.training.learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as text
    assert config.training.eval_batch_size == config.training.per_device_train_batch_size == 4
    assert config.training.resume_from_checkpoint == "auto"
    assert config.data.train[0].options == {"video_dir": "videos"}


def test_all_mistakes_at_once_with_lines_and_nearest_names(write):
    text = (
        GOOD.replace("learning_rate", "lerning_rate")
        .replace("r: 4", "r: 0")
        .replace("output_dir: runs/x", "bf16: perhaps")
    )
    text = text.replace("source: music_avqa", "wieght: 2, source: music_avqa").replace(
        "layer: -2}", "layer: -2}, segmnts: 3"
    )
    with pytest.raises(ConfigError) as error:
        load_config(write(text))
    message = str(error.value)
    for expected in (
        "training.lerning_rate (line 11): unknown key 'lerning_rate'; did you mean 'learning_rate'?",
        "adapter.r (line 6)",
        "found 0",
        "training.bf16 (line 10)",
        "found 'perhaps'",
        "training.output_dir (line 9): this key is missing",
        "data.train.0.wieght (line 8): unknown key 'wieght'; did you mean 'weight'?",
        "model.modalities.vision.segmnts (line 4): unknown key 'segmnts'; did you mean 'segments'?",
    ):
        assert expected in message, expected


def test_unknown_names_are_told_with_the_rest_and_their_nearest(write):
    text = GOOD.replace("open_clip", "openclip").replace("qformer", "qfromer").replace("method: moka", "method: mokka")
    text = text.replace("music_avqa", "music_avqua").replace("learning_rate", "lerning_rate")
    text += "evaluation: {benchmarks: [{benchmark: miniworld_avq, path: x}]}\n"
    with pytest.raises(ConfigError) as error:
        load_config(write(text))
    for expected in (
        "model.modalities.vision.encoder.name (line 4): unknown encoder 'openclip'; did you mean 'open_clip'?",
        "model.modalities.vision.projector.name (line 4): unknown projector 'qfromer'; did you mean 'qformer'?",
        "adapter.method (line 6): unknown adapter method 'mokka'; did you mean 'moka'?",
        "data.train.0.source (line 8): unknown data source 'music_avqua'; did you mean 'music_avqa'?",
        "evaluation.benchmarks.0.benchmark (line 12): unknown benchmark 'miniworld_avq'; did you mean 'miniworld_avqa'?",
        "did you mean 'learning_rate'?",
    ):
        assert expected in str(error.value), expected


def test_names_known_without_torch_are_those_of_the_registries():
    from mokamm import names
    from mokamm.adapters import METHODS
    from mokamm.projectors import PROJECTORS

    assert set(names.METHODS) == set(METHODS)
    assert set(names.PROJECTORS) == set(PROJECTORS)


def test_the_limits_of_media_are_the_same_without_a_configuration():
    from dataclasses import asdict

    from data.media import MediaLimits
    from mokamm.config_sections import LimitsConfig

    assert LimitsConfig().model_dump() == asdict(MediaLimits())


def test_all_that_the_adapters_know_can_be_configured(write):
    from mokamm.adapters import OPTIONS, OTHER_OPTIONS
    from mokamm.config_sections import AdapterConfig

    assert set(AdapterConfig.model_fields) == {"method", *OPTIONS, *OTHER_OPTIONS}
    section = "adapter: {method: moka, target_modules: '.*_proj', exclude_modules: [v_proj], shared_b: false}"
    config = load_config(write(GOOD.replace("adapter: {method: moka, r: 4}", section)))
    assert config.adapter.target_modules == ".*_proj"
    assert (config.adapter.exclude_modules, config.adapter.shared_b, config.adapter.frozen_a) == (
        ["v_proj"],
        False,
        None,
    )
    with pytest.raises(ConfigError, match=r"adapter\.target_modules \(override\): '\*_proj' is neither"):
        load_config(write(GOOD), ["adapter.target_modules='*_proj'"])


@pytest.mark.parametrize(
    ("option", "users"),
    [("mask", ["lori_s", "lori_moka_s"]), ("init_from", ["lori_d", "lori_s", "lori_moka_d", "lori_moka_s"])],
)
def test_a_file_is_refused_by_a_method_that_would_not_read_it(write, option, users):
    from mokamm import names

    path = write(GOOD)
    for method in names.METHODS:
        settings = [f"adapter.method={method}", f"adapter.{option}=x"]
        if method in users:
            load_config(path, settings)
            continue
        with pytest.raises(
            ConfigError, match=rf"adapter \(line 6\): {option} is a file of lori_.* '{method}' would not"
        ):
            load_config(path, settings)
    load_config(path, ["adapter.sparsity=0.5", "adapter.a_seed=3", "adapter.init_a_only=true"])  # harmless for moka


def test_overrides(write):
    overrides = ["training.max_steps=20", "data.train.0.limit=5", "data.cache.dir=cache", "training.report_to=none"]
    config = load_config(write(GOOD), [*overrides, "adapter.target_modules=[q_proj, v_proj]"])
    assert config.training.max_steps == 20
    assert config.data.train[0].limit == 5
    assert config.data.cache is not None
    assert config.data.cache.dir == "cache"
    assert config.training.report_to == []
    assert config.adapter.target_modules == ["q_proj", "v_proj"]


def test_names_that_transformers_has_renamed_are_mapped(write):
    path = write(GOOD)
    assert not load_config(path).training.group_by_length
    assert load_config(path, ["training.group_by_length=true"]).training.group_by_length
    assert load_config(path, ["training.metric_for_best_model=eval_loss"]).training.metric_for_best_model == "loss"
    assert load_config(path, ["training.train_sampling_strategy=group_by_length"]).training.group_by_length
    assert load_config(path, ["training.warmup_steps=0.1"]).training.warmup_steps == 0.1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["eval_strategy=steps", "save_strategy=steps"], {"eval_steps": 10, "save_steps": 500}),  # transformers' own
        (["eval_strategy=steps", "eval_steps=0.25"], {"eval_steps": 0.25}),
        (["evaluation_strategy=epoch", "eval_steps=7"], {"eval_strategy": "epoch", "eval_steps": None}),
        (["eval_strategy=no", "save_strategy=best"], {"eval_strategy": "no", "save_strategy": "best"}),  # YAML's false
        (["resume_from_checkpoint=true"], {"resume_from_checkpoint": "auto"}),
        (["resume_from_checkpoint=false"], {"resume_from_checkpoint": None}),
        (["metric_for_best_model=eval_loss", "greater_is_better=false"], {"metric_for_best_model": "loss"}),
        (["lr_scheduler_type=polynomial", "lr_scheduler_kwargs={power: 2}"], {"lr_scheduler_kwargs": {"power": 2}}),
        (["optim=adamw_torch", "fp16=false", "logging_strategy=steps", "save_safetensors=true"], {}),
        (["gradient_checkpointing_kwargs={use_reentrant: false}", "remove_unused_columns=false"], {}),
    ],
)
def test_values_of_training_arguments(write, overrides, expected):
    config = load_config(write(GOOD), [f"training.{override}" for override in overrides])
    assert {key: getattr(config.training, key) for key in expected} == expected
    again = type(config).model_validate(config.to_dict())  # as a run's config.yaml holds it
    assert {key: getattr(again.training, key) for key in expected} == expected
    assert "optim" not in config.to_dict()["training"]


def test_what_training_does_not_do_is_refused_by_its_value(write):
    refused = ["optim=sgd", "fp16=true", "gradient_checkpointing_kwargs={use_reentrant: true}", "eval_strategy=often"]
    with pytest.raises(ConfigError) as error:
        load_config(write(GOOD), [f"training.{override}" for override in refused])
    assert "optim (override): input should be 'adamw_torch' or 'adamw_torch_fused'; found 'sgd'" in str(error.value)
    assert "fp16 (override): input should be False; found True" in str(error.value)
    assert "use_reentrant (override): input should be False; found True" in str(error.value)
    assert "eval_strategy (override): input should be 'no', 'steps' or 'epoch'; found 'often'" in str(error.value)
    with pytest.raises(ConfigError, match="greater_is_better is False, while metric_for_best_model is accuracy"):
        load_config(write(GOOD), ["training.greater_is_better=false"])


def test_a_mistake_of_an_override_is_not_blamed_on_the_file(write):
    path = write(GOOD)
    with pytest.raises(ConfigError, match=r"adapter\.r \(override\): .* found 0"):
        load_config(path, ["adapter.r=0"])
    with pytest.raises(ConfigError, match=r"data\.train\.0\.limit \(override\): "):
        load_config(path, ["data.train.0={source: messages, path: a.jsonl, limit: 0}"])
    with pytest.raises(ConfigError, match=r"data\.validation has no entries; found '0'"):
        load_config(path, ["data.validation=[]", "data.validation.0.limit=1"])


def test_an_empty_section_is_its_default(write):
    path = write(f"{GOOD}\nevaluation:\n")
    assert load_config(path).evaluation == load_config(path, ["evaluation={}"]).evaluation
    assert load_config(write(GOOD), ["adapter=null"]).adapter.method == "moka"


def test_mistaken_overrides_are_told_with_the_rest(write):
    with pytest.raises(ConfigError) as error:
        load_config(write(GOOD), ["max_steps", "data.train.7.limit=1", "training.max_stepz=1", "adapter.r.x=1"])
    message = str(error.value)
    assert "override 'max_steps': expected dotted.key=value" in message
    assert "data.train has the entries 0 to 0; found '7'" in message
    assert "did you mean 'max_steps'?" in message
    assert "adapter.r is a value" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("vision:", "text:"), "'text' is always the first modality"),
        (("vision:", "Vision 1:"), "no name for a modality"),
        (("learning_rate: 1e-4", "learning_rate: -1"), "greater than 0"),
        (("learning_rate: 1e-4", "max_steps: 0"), "max_steps is 0"),
        (("learning_rate: 1e-4", "adam_beta2: 1.0"), "adam_beta2 (line 11): input should be less than 1"),
        (("learning_rate: 1e-4", "train_sampling_strategy: longest"), "expected 'random' or 'group_by_length'"),
        (("learning_rate: 1e-4", "train_sampling_strategy: random\n  group_by_length: true"), "both set"),
        (("learning_rate: 1e-4", "learning_rate: 1e-4\n  learning_rate: 2e-4"), "sets keys twice"),
        (("path: some/llm", "path: x, dtype: bfloat16"), None),
        (("train: [{source: music_avqa, path: train.json, options: {video_dir: videos}}]", "train: []"), "data.train"),
        ((GOOD, "- a\n- b\n"), "must hold a mapping"),
        ((GOOD, "a: [b\n"), "not valid YAML"),
    ],
)
def test_single_mistakes(write, change, expected):
    path = write(GOOD.replace(*change))
    if expected is None:
        load_config(path)
        with pytest.raises(ConfigError, match="one precision"):
            load_config(path, ["training.deepspeed=configs/deepspeed/zero2.json"])
        check_trainable(load_config(path))
        whole = load_config(path, ["adapter.method=full"])  # as a run of old may be; only training is refused
        with pytest.raises(UserError, match="would update 16-bit weights"):
            check_trainable(whole)
        deepspeed = ["training.deepspeed=configs/deepspeed/zero2.json", "training.bf16=true"]
        check_trainable(load_config(path, ["adapter.method=full", *deepspeed]))
        return
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "override", ["target_modules='q_proj|('", "target_parameters=['x.(']", "attention_weight_pattern={'(': 0.0}"]
)
def test_broken_patterns_are_told_with_the_config(write, override):
    with pytest.raises(ConfigError, match="unterminated subpattern"):
        load_config(write(GOOD), [f"adapter.{override}"])


def test_missing_file_names_its_neighbours(write):
    path = write(GOOD)
    with pytest.raises(ConfigError, match=r"did you mean '.*config\.yaml'"):
        load_config(path.with_name("confg.yaml"))


def test_dump_is_read_back_equal(write, tmp_path):
    config = load_config(write(GOOD))
    config.versions = {"torch": "2.11", "base": {"llm": "some/llm"}}
    config.dump(tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_files_are_located_in_the_media_folder_first(write, tmp_path):
    config = load_config(write(GOOD))
    assert config.locate(config.data.train[0]) == (Path("train.json"), Path("."))
    config.data.media_dir = str(tmp_path)
    assert config.locate(config.data.train[0]) == (tmp_path / "train.json", tmp_path)


def test_folders_and_names_of_the_hub_are_located_too(write, tmp_path):
    config = load_config(
        write(GOOD), ["data.train=[{source: librispeech, path: dev-clean}, {source: hf, path: user/rows}]"]
    )
    config.data.media_dir, config.data.validation, config.evaluation.benchmarks = str(tmp_path), [], []
    (tmp_path / "dev-clean").mkdir()
    speech, hub = config.data.train
    assert config.locate(speech) == (tmp_path / "dev-clean", tmp_path)
    assert config.locate(hub) == (Path("user/rows"), tmp_path)
    config.training.deepspeed = config.training.init_from = None
    config.check_files()
    (tmp_path / "dev-clean").rmdir()
    with pytest.raises(ConfigError, match=r"data\.train\.0\.path: no such file: .*dev-clean"):
        config.check_files()
    (tmp_path / "user" / "rows").mkdir(parents=True)
    assert config.locate(hub)[0] == tmp_path / "user" / "rows"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "slam",
            "{strip_prefix: [1]}",
            r"data source 'slam' option 'strip_prefix' should be a valid string.*; found \[1\]",
        ),
        ("slam", "{prompt: 3}", "option 'prompt' should be a valid string; found 3"),
        ("librispeech", "{lower: 'yes'}", "option 'lower' should be a valid boolean; found 'yes'"),
        ("sharegpt", "{tags: {role_tag: 1}}", "option 'tags' should be a valid string; found {'role_tag': 1}"),
        (
            "music_avqa",
            "{vidio_dir: x}",
            "data source 'music_avqa' has no option 'vidio_dir'; did you mean 'video_dir'",
        ),
        ("slam", "{prompt: null, strip_prefix: [/a, /b]}", None),
    ],
)
@pytest.mark.parametrize("key", ["train", "validation"])
def test_options_of_a_reader_are_checked_by_its_annotations(write, key, source, options, message):
    entry = f"data.{key}=[{{source: {source}, path: a, options: {options}}}]"
    if message is None:
        load_config(write(GOOD), [entry])
        return
    with pytest.raises(ConfigError, match=rf"data\.{key}\.0\.options.*: .*{message}"):
        load_config(write(GOOD), [entry])


def test_the_keys_of_a_source_are_none_of_its_options(write):
    with pytest.raises(ConfigError, match="'limit' is a key beside `options`, not one of them"):
        load_config(write(GOOD), ["data.train=[{source: slam, path: a.jsonl, options: {limit: 3}}]"])


def refuse(*_):
    raise PermissionError


@pytest.mark.parametrize("zero", ['{"stage": "auto"}', '{"stage": 4}', '{"stage": true}', "true", "[3]"])
def test_a_zero_stage_that_is_none_is_told_with_the_config(write, tmp_path, zero):
    path = tmp_path / "zero.json"
    path.write_text(f'{{"zero_optimization": {zero}}}')
    config = load_config(write(GOOD), [f"training.deepspeed={path}"])
    with pytest.raises(ConfigError, match=r"deepspeed: .*zero\.json: zero_optimization\.stage must be 0, 1, 2 or 3"):
        config.check_files()


def test_missing_files_are_all_named(write, tmp_path, monkeypatch):
    overrides = ["training.deepspeed=configs/deepspeed/zero22.json", f"training.init_from={tmp_path}/none"]
    config = load_config(write(GOOD), overrides)
    with pytest.raises(ConfigError) as error:
        config.check_files()
    message = str(error.value)
    assert "data.train.0.path: no such file: train.json" in message
    assert "zero22.json; did you mean 'configs/deepspeed/zero2.json'" in message
    assert "training.init_from: no such folder" in message
    assert f"(working directory {Path.cwd()})" in message
    (tmp_path / "rows.json").touch()
    config.data.train[0].path = f"{tmp_path}/row.json"
    with pytest.raises(ConfigError, match=r"row\.json; did you mean 'rows\.json'\?"):
        config.check_files()
    with monkeypatch.context() as patch:  # a folder that may be entered but not listed
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(ConfigError, match=r"no such file: .*row\.json\n"):
            config.check_files()
    config = load_config(write(GOOD), [f"data.world={{dir: {tmp_path}, train: 1, validation: 1, test: 1}}"])
    config.data.train[0].path = f"{tmp_path}/train/train.json"
    config.check_files()  # the run makes these itself
    with pytest.raises(ConfigError, match=r"data\.train\.0\.path: no such file"):
        config.check_files(world_is_made=True)


def test_the_command_tells_a_mistake_without_traceback_and_without_torch(write):
    path = write(GOOD.replace("learning_rate", "lerning_rate"))
    code = (
        "import sys; from mokamm import train\n"
        f"try: train.main([{str(path)!r}])\n"
        "except SystemExit as e: print('code', e.code, [m for m in ('torch', 'transformers', 'deepspeed') if m in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "code 2 []"
    assert "did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr


def is_recipe(path: Path) -> bool:
    """Not a comparison (tests/eval/test_compare_plan.py), nor a part that recipes extend."""
    return path.relative_to(ROOT / "configs").parts[0] not in ("compare", "parts")


@pytest.mark.parametrize("path", filter(is_recipe, sorted((ROOT / "configs").rglob("*.yaml"))), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(path):
    load_config(path)
    assert path.read_text().lstrip().startswith("#"), "a recipe opens with its purpose and how to start it"
    assert yaml.safe_load(path.read_text())["training"]["output_dir"].startswith("runs/")


# ---- extends ---------------------------------------------------------------------------------------------------------


def test_a_file_is_laid_over_those_it_extends(tmp_path):
    whole = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": whole["model"]}))
    (tmp_path / "sub").mkdir()
    rest = {key: value for key, value in whole.items() if key != "model"}
    (tmp_path / "sub" / "rest.yaml").write_text(yaml.safe_dump({"extends": "../model.yaml", **rest}))
    own = "extends: [sub/rest.yaml]\nadapter: {r: 8}\ndata:\n  train: [{source: ave, path: x}]\n"
    (tmp_path / "own.yaml").write_text(own)
    config = load_config(tmp_path / "own.yaml", ["adapter.lora_alpha=2"])
    assert (config.adapter.r, config.adapter.lora_alpha, config.adapter.method) == (8, 2, "moka")
    assert [entry.path for entry in config.data.train] == ["x"]
    assert config.model == load_config(ROOT / "configs" / "quickstart.yaml").model


def test_mistakes_in_files_that_extend_others_are_told_with_their_file(tmp_path):
    (tmp_path / "below.yaml").write_text("adapter:\n  rr: 4\n")
    (tmp_path / "own.yaml").write_text("extends: below.yaml\ntraining:\n  sed: 1\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "own.yaml")
    assert f"adapter.rr (line 2 of {tmp_path / 'below.yaml'}): unknown key" in str(error.value)
    assert "training.sed (line 3): unknown key 'sed'; did you mean 'seed'?" in str(error.value)
    (tmp_path / "below.yaml").write_text("extends: own.yaml\n")
    with pytest.raises(ConfigError, match=r"extends itself, through own.yaml > below.yaml"):
        load_config(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("extends: 7\n")
    with pytest.raises(ConfigError, match="expected the name of a file"):
        load_config(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("extends: belo.yaml\n")
    with pytest.raises(ConfigError, match=r"no such configuration file(.|\n)*did you mean"):
        load_config(tmp_path / "own.yaml")


def test_a_benchmark_may_be_a_folder_and_a_path_may_name_its_media_folder(tmp_path, monkeypatch):
    """As configs/parts/speech_text/instructions.yaml has LibriSpeech: there or not, it is looked for where it is named."""
    monkeypatch.chdir(tmp_path)
    entry = {"benchmark": "librispeech", "path": "data/test-clean", "media_dir": "data/test-clean"}
    tree = {
        "model": {"llm": {"path": "x"}},
        "data": {"train": [{"source": "messages", "path": "x.jsonl"}]},
        "training": {"output_dir": "x"},
        "evaluation": {"benchmarks": [entry]},
    }
    config = RunConfig.model_validate(tree)
    assert config.locate(config.evaluation.benchmarks[0]) == (Path("data/test-clean"), Path("data/test-clean"))
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ConfigError, match=r"evaluation.benchmarks.0.path: no such file: data/test-clean$"):
        config.check_files()
    # AVE's own layout: a folder AVE within one of that name; what lies inside comes first
    (tmp_path / "AVE/AVE").mkdir(parents=True)
    (tmp_path / "AVE/AVE/list.txt").touch()
    entry = config.data.train[0].model_copy(update={"path": "AVE/list.txt", "media_dir": "AVE"})
    assert config.locate(entry)[0] == Path("AVE/AVE/list.txt")
    (tmp_path / "data/test-clean").mkdir(parents=True)
    config.check_files()


def test_what_is_newer_and_not_set_leaves_digests_as_they_were(write):
    config = load_config(write(GOOD))
    assert {"chat_date", "thinking"}.isdisjoint(config.to_dict()["model"]["llm"])
    config.model.llm.thinking, config.model.llm.chat_date = True, date(2026, 11, 29)
    llm = config.to_dict()["model"]["llm"]
    assert (llm["thinking"], llm["chat_date"], llm["revision"]) == (True, "2026-11-29", None)


def test_a_date_is_a_name_where_a_name_is_asked_for(write):
    """A run or a revision may be called by its day; a day that there is not is told as any other mistake."""
    config = load_config(write(GOOD), ["training.output_dir=2026-11-29", "model.llm.chat_date=2026-11-29"])
    assert config.training.output_dir == "2026-11-29"
    assert config.model.llm.chat_date == date(2026, 11, 29)
    assert load_config(write(GOOD.replace("runs/x", "2026-11-29"))).training.output_dir == "2026-11-29"
    text = GOOD.replace("some/llm", "some/llm, revision: 2024-08-06, chat_date: 2026-13-01")
    with pytest.raises(ConfigError, match=r"model.llm.chat_date \(line 2\): .*month.*; found '2026-13-01'") as error:
        load_config(write(text))
    assert "revision" not in str(error.value)
