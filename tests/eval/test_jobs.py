"""Which benchmarks an evaluation runs: entries of a config, their options and names, and the command line's."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from data.schema import UserError
from eval.benchmarks import BENCHMARKS
from eval.controls import Control
from eval.jobs import Job, plan_jobs, read_options
from eval.run import parse_arguments
from mokamm.config import ConfigError, RunConfig, load_config, load_run_config

MMBENCH = "index\tquestion\thint\tA\tB\tC\tanswer\tcategory\timage\n7\tWhat?\tnan\tcat\tdog\tcow\tB\tx\t{image}\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mmbench.tsv"
    path.write_text(MMBENCH.format(image=base64.b64encode(b"a picture").decode()))
    return path


def plan(run: Path, entries: list[dict[str, Any]], *words: str) -> list[Job]:
    config = load_run_config(run).to_dict()
    config["evaluation"]["benchmarks"] = entries
    return plan_jobs(RunConfig.model_validate(config), parse_arguments([words[0], str(run), *words[1:]]))


def test_options_of_an_entry_reach_the_benchmark(small_run: Path, table: Path) -> None:
    entries = [
        {"benchmark": "mmbench", "path": str(table)},
        {"benchmark": "mmbench", "path": str(table), "name": "mmbench_circular", "options": {"circular": True}},
    ]
    plain, circular = plan(small_run, entries, "all")
    assert (plain.name, circular.name) == ("mmbench", "mmbench_circular")
    assert len(plain.load(Control())) == 1
    assert [row.answer for row in circular.load(Control())] == ["B", "A", "C"]
    assert [job.name for job in plan(small_run, entries, "mmbench_circular")] == ["mmbench_circular"]
    assert [job.name for job in plan(small_run, entries, "mmbench")] == ["mmbench", "mmbench_circular"]
    (asked,) = plan(small_run, [], "mmbench", "--path", str(table), "--option", "circular=true")
    assert asked.options == {"circular": True}
    assert len(asked.load(Control())) == 3


@pytest.mark.parametrize(
    ("benchmark", "options", "message"),
    [
        ("mmbench", {"circuler": True}, "has no option 'circuler'; did you mean 'circular'?"),
        ("mmbench", {"circular": "yes"}, "option 'circular' should be a valid boolean; found 'yes'"),
        ("air_bench", {"tasks": "sound"}, "option 'tasks' should be 'speech' or 'all'; found 'sound'"),
        ("ave", {"video_dirs": "x"}, "has no option 'video_dirs'; did you mean 'video_dir'?"),
        ("ave", {"video_dir": ["x"]}, "option 'video_dir' should be a valid string; found ['x']"),
        ("ave", {"strip_prefix": [1]}, "option 'strip_prefix' should be a valid string; found [1]"),
        ("miniworld_images", {"strip_prefx": "x"}, "did you mean 'strip_prefix'?"),
        ("pope", {"circular": True}, "has no option 'circular'; it has none"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_loaded(
    small_run: Path, table: Path, benchmark: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as told:
        plan(small_run, [{"benchmark": benchmark, "path": str(table), "options": options}], "all")
    assert f"benchmark {benchmark} " in str(told.value)
    assert message in str(told.value)


def test_every_option_that_a_docstring_names_is_known() -> None:
    for benchmark, option in (("mmau", "speech_as"), ("air_bench", "speech_as"), ("audiocaps", "name")):
        assert BENCHMARKS[benchmark].option_problems({option: "speech"}) == []
    for benchmark in BENCHMARKS.values():
        assert benchmark.option_problems(benchmark.options) == []
        assert benchmark.option_problems(benchmark.truth_options) == []


def test_options_of_the_command_line_are_read_as_those_of_a_configuration() -> None:
    assert read_options(["circular=true", "name=2026-13-01"]) == {"circular": True, "name": "2026-13-01"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["all", "--option", "circular=true"], "--option belongs to one benchmark"),
        (["mmbench", "--option", "circular"], "expected NAME=VALUE"),
        (["mmbench"], "give each entry a `name` of its own"),
        (["pope"], "the run names no files for 'pope' (its evaluation.benchmarks: mmbench, mmbench)"),
    ],
)
def test_mistakes(small_run: Path, table: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as told:
        plan(small_run, [{"benchmark": "mmbench", "path": str(table)}] * 2, *words)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "../x"}, "evaluation.benchmarks.0.name"),
        ({"options": {"limit": 3}}, "'limit' is a key beside `options`"),
        ({"option": {}}, "did you mean 'options'?"),
    ],
)
def test_a_configuration_is_checked(small_run: Path, tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    import yaml

    config = load_run_config(small_run).to_dict()
    config["evaluation"]["benchmarks"] = [{"benchmark": "mmbench", "path": "x", **entry}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError) as told:
        load_config(tmp_path / "config.yaml")
    assert message in str(told.value)


def test_an_entry_of_its_own_name_keeps_its_options_with_another_file(small_run: Path, table: Path) -> None:
    entry = {"benchmark": "mmbench", "path": "elsewhere.tsv", "name": "turned", "options": {"circular": True}}
    (job,) = plan(small_run, [entry], "turned", "--path", str(table))
    assert (job.name, job.path, job.media_dir, job.options) == ("turned", table, table.parent, {"circular": True})


def test_another_file_keeps_the_options_and_limit_of_the_one_entry_that_is_meant(small_run: Path, table: Path) -> None:
    entry = {"benchmark": "mmbench", "path": "elsewhere.tsv", "limit": 2, "options": {"circular": True}}
    (job,) = plan(small_run, [entry, {"benchmark": "pope", "path": "x"}], "mmbench", "--path", str(table))
    assert (job.name, job.path, job.limit, job.options) == ("mmbench", table, 2, {"circular": True})
    (either,) = plan(small_run, [entry | {"name": "a"}, entry | {"name": "b"}], "mmbench", "--path", str(table))
    assert (either.name, either.limit, either.options) == ("mmbench", None, {})
