"""Signals and bad steps: real signals to real processes, real overflows in the toy model's weights; nothing is patched."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.schema import UserError
from mokamm import train
from mokamm.training.bad_steps import FEWEST, MEMORY, PATIENCE, marked
from mokamm.training.checkpoint import STATE, newest_first
from mokamm.training.corpus import batches
from mokamm.training.loop import better
from mokamm.training.stopping import SIGNALS, BadStep, agreed, command_to_go_on
from mokamm.training.watch import read_metrics
from mokamm.weights import manifest_problems

SCRIPT = Path(__file__).with_name("toy_stopping.py")
ROOT = SCRIPT.parents[2]
STAGES = ("zero1", "zero2", "zero3")
ENVIRONMENT = {
    **os.environ, "CC": "/bin/false", "CXX": "/bin/false", "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}  # fmt: skip


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy_stopping", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(folder: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder, "train")]


@contextmanager
def started(command: list[str], **settings: Any) -> Iterator[subprocess.Popen]:
    """A process whose output is one stream; no longer alive afterwards, whatever happens."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **settings)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(ready, process: subprocess.Popen) -> None:
    """Until `ready()`; fails with the process's output if it ends before."""
    while not ready():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode} too early:\n{process.communicate()[0][-4000:]}")
        time.sleep(0.05)


def state_of(checkpoint: Path) -> dict:
    """All tensors of a checkpoint: weights, and every rank's optimizer."""
    tensors = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        tensors |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted(checkpoint.glob("optimizer-rank*.pt")):
        _collect(torch.load(path, weights_only=True), path.name, tensors)
    return tensors


def _collect(value, name: str, tensors: dict) -> None:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            _collect(entry, f"{name}.{key}", tensors)


def assert_left_out(folder: Path, step: int) -> None:
    """The checkpoints on both sides of a skipped step hold the same; those of the next step do not."""
    before, at, after = (state_of(folder / f"checkpoint-{n}") for n in (step - 1, step, step + 1))
    assert before.keys() == at.keys()
    assert len(before) > 10
    assert [name for name in before if not torch.equal(before[name], at[name])] == []
    assert any(not torch.equal(at[name], after[name]) for name in at)
    assert all(torch.isfinite(tensor).all() for tensor in after.values() if tensor.is_floating_point())


# ---- signals -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One launch of two processes: skipped steps under each stage, then a run of which rank 1 alone is signalled."""
    folder = tmp_path_factory.mktemp("stopping")
    command = [shutil.which("deepspeed", path=ENVIRONMENT["PATH"]), "--num_gpus", "2"]
    command += ["--master_port", str(21000 + os.getpid() % 20000), str(SCRIPT), str(folder), *STAGES]
    halved = folder / "halved"
    halved.mkdir()
    with started(command, env=ENVIRONMENT, cwd=ROOT) as process:
        try:
            wait_for(lambda: len(read_metrics(halved / "metrics.jsonl")) == 3, process)
            os.kill(int((folder / "pid-1").read_text()), signal.SIGTERM)
        finally:
            (halved / "go").touch()
        output = process.communicate()[0]
    return folder, process.returncode, output


def test_a_signal_to_one_rank_stops_all_and_the_launcher_ends_with_its_code(two_ranks):
    folder, code, output = two_ranks
    assert code == 128 + signal.SIGTERM, output[-4000:]
    stopped = json.loads((folder / "halved/stopped.json").read_text())
    assert 3 <= stopped["step"] < 8
    assert not manifest_problems(Path(stopped["folder"]))
    assert f"resuming from {stopped['folder']}" in output


def test_a_stopped_run_goes_on_bit_identically(two_ranks):
    folder, _, _ = two_ranks
    assert len(losses(folder / "whole")) == 8
    assert losses(folder / "halved") == losses(folder / "whole")
    assert records(folder / "halved", "validation") == records(folder / "whole", "validation")


def test_a_validation_that_a_signal_cut_off_is_made_when_the_run_goes_on(two_ranks):
    folder, _, _ = two_ranks
    stopped = json.loads((folder / "cut/stopped.json").read_text())
    assert (stopped["step"], stopped["unvalidated"], stopped["best"]) == (8, True, None)
    assert records(folder / "cut", "validation") == records(folder / "whole", "validation")
    states = [json.loads((folder / run / "checkpoint-8" / STATE).read_text()) for run in ("cut", "whole")]
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A configuration of mokamm/train.py that needs no media, and more steps than anyone waits for."""
    folder = tmp_path_factory.mktemp("text")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} {n}"}]}
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(
        f"model: {{llm: {{path: {ROOT}/mokamm/mini/llm}}}}\nadapter: {{method: lora}}\n"
        f"data: {{train: [{{source: messages, path: {folder}/rows.jsonl}}], max_length: 64}}\n"
        f"training: {{output_dir: {folder}/run, max_steps: 100000, per_device_train_batch_size: 2, logging_steps: 1,\n"
        "  report_to: [], use_cpu: true, dataloader_num_workers: 2, save_steps: 100000}\n"
    )
    return folder


def test_ctrl_c_ends_the_real_command_with_a_whole_checkpoint_and_the_way_on(text_run):
    """To the whole process group, as a terminal does: the loader's workers get it too."""
    command = [sys.executable, str(ROOT / "mokamm/train.py"), str(text_run / "run.yaml"), "training.seed=3"]
    with started(command, env=ENVIRONMENT, start_new_session=True) as process:
        wait_for(lambda: len(read_metrics(text_run / "run/metrics.jsonl")) >= 2, process)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGINT, output
    (saved,) = newest_first(text_run / "run")
    assert not manifest_problems(saved)
    assert saved.name == f"checkpoint-{records(text_run / 'run', 'train')[-1]['step']}"
    assert not (text_run / "run/final").exists()
    assert "Traceback" not in output
    told, command_line = output.strip().splitlines()[-2:]
    assert "SIGINT" in told
    assert str(saved) in told
    assert command_line.split() == ["python", *command[1:]]


def test_a_run_that_too_many_bad_rows_end_leaves_although_the_loader_s_workers_ignore_signals(text_run):
    row = json.dumps({"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": ""}]})
    (text_run / "bad.jsonl").write_text("\n".join([row] * 40))
    command = [sys.executable, str(ROOT / "mokamm/train.py"), str(text_run / "run.yaml")]
    bad = f"data.train=[{{source: messages, path: {text_run}/bad.jsonl}}]"
    with started([*command, bad, f"training.output_dir={text_run}/ended"], env=ENVIRONMENT) as process:
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert "more than data.max_bad_fraction" in output
    assert "Traceback" not in output


def test_ctrl_c_saves_although_it_has_ended_the_reader_of_the_output_first(text_run):
    """As `train.py CONFIG 2>&1 | tee log` in a terminal."""
    folder = text_run / "piped"
    command = [sys.executable, str(ROOT / "mokamm/train.py"), str(text_run / "run.yaml")]
    with started([*command, f"training.output_dir={folder}"], env=ENVIRONMENT) as process:
        while len(read_metrics(folder / "metrics.jsonl")) < 2:
            assert process.stdout.readline()
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGINT
    (saved,) = newest_first(folder)
    assert not manifest_problems(saved)


left_open: list[Iterator[Any]] = []


def leave_a_loader_open() -> None:
    loader = batches([0], [[0]] * 9, 0, workers=2, join=lambda *_: {"labels": torch.zeros(1), "media": {}})
    left_open.append(iter(loader))
    next(left_open[0])


def test_so_does_a_process_that_multiprocessing_has_started():
    """A run of eval/compare.py."""
    process = multiprocessing.get_context("fork").Process(target=leave_a_loader_open)
    process.start()
    process.join(timeout=60)
    code = process.exitcode
    process.kill()
    assert code == 0


HANGING = """
import hashlib, sys
from mokamm.training.stopping import SignalWatch
with SignalWatch():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, where no handler of Python's runs
"""


def test_a_second_signal_leaves_at_once_also_where_the_main_thread_hangs_but_an_echo_does_not():
    with started([sys.executable, "-c", HANGING], cwd=ROOT) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "\n"
        assert process.stdout.readline().startswith("SIGINT: the run saves")
        process.send_signal(signal.SIGTERM)  # deepspeed's launcher, after a Ctrl-C
        time.sleep(1.5)
        assert process.poll() is None
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert output.count("SIGTERM again: leaving at once") == 1


RANK = """
import sys, time
from pathlib import Path
from mokamm.training.stopping import SignalWatch, agreed
with SignalWatch() as watch:
    Path(sys.argv[1], "ready").touch()
    while not any(watch.votes()):
        time.sleep(0.02)
    Path(sys.argv[1], "stopped").write_text(agreed(watch.votes()).name)
"""
START = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


def test_ranks_stop_where_the_deepspeed_command_has_gone(tmp_path):
    """As the real one: command, launcher, rank; a signal to the command ends it alone."""
    command = tmp_path / "deepspeed"
    command.write_text(START)
    with started([sys.executable, str(command), "-c", START, "-c", RANK, str(tmp_path)], cwd=ROOT) as process:
        wait_for((tmp_path / "ready").exists, process)
        process.terminate()
        assert process.wait() == -signal.SIGTERM
        while not (tmp_path / "stopped").exists():
            time.sleep(0.02)
    assert (tmp_path / "stopped").read_text() == "SIGTERM"


PROGRAM = """
import signal, sys
from mokamm.training.launch import run_program
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
run_program([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"])
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_the_evaluation_ends_with_the_training_that_waits_for_it(number):
    with started([sys.executable, "-c", PROGRAM], cwd=ROOT) as process:
        program = int(process.stdout.readline())
        process.send_signal(number)
        process.communicate()
    assert process.returncode == -number
    assert not Path(f"/proc/{program}").exists()


def test_a_program_is_run_in_any_thread():
    from mokamm.training.launch import run_program

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(run_program, [sys.executable, "-c", "raise SystemExit(3)"]).result() == 3


def test_handlers_are_as_before_after_the_loop():
    from mokamm.training.stopping import SignalWatch

    before = [signal.getsignal(number) for number in SIGNALS]
    with SignalWatch() as watch:
        assert watch.votes() == [0.0, 0.0]
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ctrl_c_outside_the_steps_has_no_traceback(text_run, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["mokamm/train.py"])
    with pytest.raises(SystemExit) as left:
        train.main([str(text_run / "run.yaml"), "training.seed=3"])
    assert left.value.code == 128 + signal.SIGINT
    told = f"stopped; to go on:\n  python mokamm/train.py {text_run / 'run.yaml'} training.seed=3\n"
    assert capfd.readouterr() == (told, "")


def test_ranks_agree_on_one_signal():
    assert agreed([0.0, 0.0]) is None
    assert agreed([8.0, 0.0]) == signal.SIGINT
    assert agreed([1.0, 1.0]) == signal.SIGTERM


def test_the_command_to_go_on_is_the_one_that_was_given(monkeypatch):
    for name in ("LOCAL_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["mokamm train", "a.yaml"])
    assert command_to_go_on("a.yaml", ["x=[1, 2]"], auto=True) == "mokamm train a.yaml 'x=[1, 2]'"
    monkeypatch.setattr(sys, "argv", ["mokamm/train.py", "--local_rank=0", "a.yaml"])
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    wanted = "deepspeed --num_gpus 2 mokamm/train.py a.yaml training.resume_from_checkpoint=auto"
    assert command_to_go_on("a.yaml", [], auto=False) == wanted
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command_to_go_on("a.yaml", [], auto=True).endswith("(the launcher as before, for all 4 processes)")


# ---- bad steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "reason"), [(3e38, "a loss"), (1e37, "a gradient")])
def test_stop_names_the_rows_and_saves_nothing_and_skip_goes_on_from_there(toy, tmp_path, size, reason):
    """3e38 overflows in the forward pass; 1e37 only in the backward pass, at a loss that looks well."""
    setting = {**toy.SKIPPING, "on_nan": "stop"}
    with pytest.raises(BadStep, match=f"step 2: {reason} that is not finite") as error:
        toy.run(tmp_path / "run", toy.toy.alone(), size=size, **setting)
    lines = str(error.value).splitlines()
    # the worst micro batch first; a gradient is nobody's, so that any of them may be the one
    assert f"train row {toy.ROW} (id {toy.ROW})" in (lines[2] if reason == "a loss" else str(error.value))
    assert "checkpoint-1 is untouched" in lines[-1]
    assert "on_nan=skip" in str(error.value)
    assert [folder.name for folder in newest_first(tmp_path / "run")] == ["checkpoint-1"]
    (bad,) = records(tmp_path / "run", "bad_step")
    named = [row["row"] for entry in bad["micro_batches"] for row in entry["rows"]]
    assert len(set(named)) == 4  # two micro batches of two
    assert toy.ROW in named

    toy.run(tmp_path / "run", toy.toy.alone(), size=size, **toy.SKIPPING)
    toy.run(tmp_path / "whole", toy.toy.alone(), size=size, **toy.SKIPPING)
    assert_left_out(tmp_path / "run", 2)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 3, 4, 5, 6]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    strict = (tmp_path / "run/metrics.jsonl").read_text()
    assert not {"NaN", "Infinity"} & set(strict.replace(":", " ").replace(",", " ").split())


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_leave_the_same_update_out_under_zero(toy, two_ranks, tmp_path, stage):
    folder = two_ranks[0] / stage
    assert_left_out(folder, 2)
    (bad,) = records(folder, "bad_step")
    toy.run(tmp_path, toy.toy.alone(), size=3e38, **toy.SKIPPING)
    (alone,) = records(tmp_path, "bad_step")
    assert bad["micro_batches"][0] == {"loss": "nan", "rows": [{"source": "train", "row": toy.ROW, "id": str(toy.ROW)}]}
    rows = [{row["row"] for entry in record["micro_batches"] for row in entry["rows"]} for record in (bad, alone)]
    assert rows[0] == rows[1]  # those of both ranks
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=1e-5)


def test_skipping_ends_where_no_step_can_be_used(toy, tmp_path):
    """A weight that every row meets: it is not the rows."""
    model = toy.toy.build()
    with torch.no_grad():
        model.projectors["vision"][1].bias.fill_(float("inf"))
    settings = toy.toy.config(tmp_path, max_steps=20, on_nan="skip", save_steps=3, save_total_limit=1)
    ranks, corpus = toy.toy.alone(), toy.toy.corpus(tmp_path)
    with pytest.raises(BadStep, match=rf"step {PATIENCE}: .*bad step number {PATIENCE} in a row"):
        toy.fit(settings, model, toy.toy.parts_of(model), corpus, ranks, toy.begin(settings, corpus, ranks))
    assert not losses(tmp_path)
    kept = [folder.name for folder in newest_first(tmp_path)]  # older ones may be good: nothing was deleted meanwhile
    assert kept == ["checkpoint-9", "checkpoint-6", "checkpoint-4", "checkpoint-3"]


def test_a_spike_is_left_out_and_its_memory_survives_a_resume(toy, tmp_path):
    """Sharp logits give rows losses far apart; which step is the first spike is computed from an unguarded run."""
    setting = {
        "max_steps": 20, "learning_rate": 1e-5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "eval_steps": 50, "save_steps": 10, "size": 1.0, "sharp": 200.0, "load_best_model_at_end": False,
    }  # fmt: skip
    toy.run(tmp_path / "free", toy.toy.alone(), **setting)
    found = losses(tmp_path / "free")
    ratios = {i + 1: x / (sum(found[:i]) / i) for i, x in enumerate(found) if i >= FEWEST}
    limit = 0.99 * max(ratios.values())
    step = next(step for step, ratio in ratios.items() if ratio > limit)
    assert limit > 1.1
    assert len(found) < MEMORY

    def guarded(folder: Path, **values) -> None:
        toy.run(folder, toy.toy.alone(), loss_spike=limit, on_nan="skip", **{**setting, **values})

    guarded(tmp_path / "skip", save_steps=1, save_total_limit=None)
    bad = records(tmp_path / "skip", "bad_step")
    assert bad[0]["step"] == step
    assert "times the mean of the last" in bad[0]["reason"]
    assert_left_out(tmp_path / "skip", step)
    assert losses(tmp_path / "skip")[: step - 1] == found[: step - 1]  # looking at the loss changes nothing

    shutil.copytree(tmp_path / "skip", tmp_path / "again")
    for folder in newest_first(tmp_path / "again"):
        if int(folder.name.split("-")[1]) > step - 1:
            shutil.rmtree(folder)
    guarded(tmp_path / "again", save_steps=1, save_total_limit=None)
    assert records(tmp_path / "again", "bad_step") == bad
    assert losses(tmp_path / "again") == losses(tmp_path / "skip")


def test_a_validation_loss_that_is_no_number_is_beaten_by_any():
    bad, good = {"loss": math.nan, "accuracy": 0.0}, {"loss": 9.0, "accuracy": 0.0}
    for metric in ("loss", "accuracy"):
        assert better(good, bad, metric)
        assert not better(bad, good, metric)


@pytest.mark.parametrize("value", [2.5, 0.0, -1e30, 3e38])
def test_a_finite_loss_and_its_gradient_are_bit_identical_when_marked(value):
    loss = torch.tensor(value, requires_grad=True)
    result = marked(loss)
    result.backward()
    assert result.item() == loss.item()
    assert loss.grad.item() == 1.0


@pytest.mark.parametrize(("value", "usable"), [(math.inf, True), (math.nan, True), (2.5, False)])
def test_other_losses_have_no_finite_gradient(value, usable):
    loss = torch.tensor(value, requires_grad=True)
    marked(loss, usable).backward()
    assert math.isnan(loss.grad.item())


def test_deepspeed_settings_that_would_hide_a_bad_gradient_are_refused(toy, tmp_path):
    from mokamm.training.engine import deepspeed_config

    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto", "check_grad_overflow": false}}')
    settings = toy.toy.config(tmp_path, deepspeed=str(path), bf16=True).training
    with pytest.raises(UserError, match=r"check_grad_overflow' is False"):
        deepspeed_config(settings, toy.toy.alone(), 10)
