"""Disks that fill up, refuse or lose bytes, and folders of other programs: one message, no checkpoint lost, exact resume.

Real limits of the kernel stand in for a bad disk: a limit on file sizes (EFBIG) in this process, and in a mount namespace
of its own a small tmpfs (ENOSPC) and a read-only one (EROFS), see tests/faults/disk.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.schema import UserError
from mokamm.training import checkpoint, disk
from mokamm.training.checkpoint import NEEDED, newest_first
from mokamm.training.watch import read_metrics
from mokamm.weights import MANIFEST, manifest_problems

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    MANIFEST, "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "optimizer-rank0.pt",
    "projectors.safetensors", "rng-rank0.pt", "trainer_state.json", "window-rank0.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    toy.run(folder, toy.alone(), dropout=0.2)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a run with checkpoint-8 and checkpoint-4."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


# ---- a disk that refuses ---------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int):
    """Writing beyond `size` bytes of any file fails with EFBIG, as beyond the room on a disk with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "refused"), [(50_000, "optimizer"), (12_000, "rng"), (None, "metrics")])
def test_a_write_that_fails_ends_in_one_message_and_loses_nothing(toy, whole, tmp_path, size, refused):
    toy.run(tmp_path, toy.alone(), dropout=0.2, stop_after=5)
    kept = {p: p.read_bytes() for p in (tmp_path / "checkpoint-4").rglob("*") if p.is_file()}
    metrics = (tmp_path / "metrics.jsonl").stat().st_size  # a few bytes more or less, with the digits of times
    with largest_file(size or metrics + 50), pytest.raises(UserError) as error:
        toy.run(tmp_path, toy.alone(), dropout=0.2)
    message = str(error.value)
    assert f"{tmp_path / 'metrics.jsonl' if refused == 'metrics' else tmp_path / 'checkpoint-8'} cannot be" in message
    assert "File too large" in message
    assert "MB free" in message
    assert "start the same command again" in message
    assert not list(tmp_path.glob(".checkpoint*"))
    assert {p: p.read_bytes() for p in kept} == kept
    toy.run(tmp_path, toy.alone(), dropout=0.2)
    assert read_without_times(tmp_path) == read_without_times(whole)


def read_without_times(run: Path) -> list[tuple]:
    return [(r["kind"], r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl")]


def test_a_full_and_a_read_only_disk(tmp_path):
    """In a mount namespace of its own; the script says what it saw."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let its users make mount namespaces")
    done = subprocess.run(
        [*namespace, sys.executable, "-m", "tests.faults.disk", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "No space left on device" in found["full"]
    assert f"{found['newest']} is untouched" in found["full"]
    assert found["left_half_written"] == []
    assert found["after_room_was_made"] == found["uninterrupted"]
    assert "Read-only file system" in found["read_only"]
    assert found["whole_before"] == found["whole_after"]
    assert len(found["whole_after"]) >= 2


def test_an_error_that_no_disk_made_is_not_told_as_one(tmp_path):
    with pytest.raises(ValueError, match="a bug"), disk.writing(tmp_path, "do something"):
        raise ValueError("a bug")
    with pytest.raises(KeyError, match="another bug"), disk.writing(tmp_path, "do something"):
        a_bug_after_a_miss(tmp_path / "absent")


def a_bug_after_a_miss(path):
    try:
        return path.read_text()
    except OSError:
        return {}["another bug"]


def test_a_folder_has_one_training_at_a_time(tmp_path):
    lock = disk.hold(tmp_path)
    script = f"from pathlib import Path; from mokamm.training.disk import hold; hold(Path({str(tmp_path)!r}))"
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"another process is training in this folder (process {os.getpid()} on " in other.stderr
    lock.close()
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_where_another_rank_cannot_write_no_rank_goes_on(tmp_path):
    class Ranks:
        main = True

        def sum(self, values):
            return [values[0] + 1.0]  # another rank's failure

    (tmp_path / "half").mkdir()
    with pytest.raises(UserError, match="another rank could not write its part"):
        checkpoint._together(lambda: None, tmp_path / "half", tmp_path / "checkpoint-3", Ranks())
    assert not (tmp_path / "half").exists()


# ---- bytes that are lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied", "removed"])
@pytest.mark.parametrize("name", FILES)
def test_any_damaged_file_is_noticed_and_the_previous_checkpoint_used(run, capsys, name, damage):
    newest, older = newest_first(run)
    assert sorted(p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()) == sorted(FILES)
    path = newest / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "altered": content, "emptied": b""}[damage])
    assert checkpoint.find(run, "auto") == older
    assert f"{newest} is passed over, it is not whole: {newest / name}" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be used"):
        checkpoint.find(run, str(newest))


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_no_bit_of_a_manifest_can_flip_in_silence(whole, place, bit):
    source = newest_first(whole)[0]
    content = bytearray((source / MANIFEST).read_bytes())
    meant = json.loads(content)["files"]
    content[place % len(content)] ^= 1 << bit
    (whole / "altered").mkdir(exist_ok=True)
    (whole / "altered" / MANIFEST).write_bytes(content)
    for name in FILES[1:]:
        copy = whole / "altered" / name
        copy.parent.mkdir(exist_ok=True)
        if not copy.exists():
            os.link(source / name, copy)
    problems = manifest_problems(whole / "altered", NEEDED)
    assert problems or json.loads(content)["files"] == meant


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_nothing_else(toy, whole, run):
    (newest_first(run)[0] / "optimizer-rank0.pt").write_bytes(b"")
    (run / "metrics.jsonl").open("a").write('{"kind": "train", "st')  # as a crash may leave it
    toy.run(run, toy.alone(), dropout=0.2)
    assert read_without_times(run) == read_without_times(whole)
    assert (run / "previous-1" / "checkpoint-8").is_dir()  # kept for its owner to look at
    assert not manifest_problems(run / "checkpoint-8", NEEDED)


FOREIGN = {
    "transformers, half written": {"trainer_state.json": '{"global_step": 99}', "optimizer.pt": "PK"},
    "empty": {},
    "a manifest of nothing": {MANIFEST: '{"files": {}}'},
    "another program's manifest": {MANIFEST: '["a", "b"]', "a": "", "b": ""},
    "a manifest with other fields": {MANIFEST: '{"files": {"trainer_state.json": "sha256:0"}}'},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_of_another_program_is_passed_over_and_kept(toy, run, capsys, content):
    foreign = run / "checkpoint-99"
    foreign.mkdir()
    for name, text in content.items():
        (foreign / name).write_text(text)
    (run / "checkpoint-²").mkdir()
    (run / "checkpoint-100").write_text("a file")
    before = checkpoint.find(run, "auto")
    assert before == run / "checkpoint-8"
    assert f"{foreign} is passed over, it is not whole: {foreign / MANIFEST}" in capsys.readouterr().out
    toy.run(run, toy.alone(), dropout=0.2)
    aside = run / "previous-1" / "checkpoint-99"
    assert {p.name: p.read_text() for p in aside.iterdir()} == content
    assert checkpoint.find(run, "auto") == before


def test_a_best_checkpoint_that_is_damaged_is_never_made_the_result(toy, run, capsys):
    state = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())
    best = run / f"checkpoint-{int(state['best']['step'])}"
    adapter = best / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    with pytest.raises(UserError, match="the run's result cannot be taken from"):
        checkpoint.write_final(run, best)
    _, result = toy.run(run, toy.alone(), dropout=0.2)
    assert not manifest_problems(checkpoint.write_final(run, result))
    assert not manifest_problems(result, NEEDED)
    if best.name == "checkpoint-4":
        assert "the best checkpoint so far cannot be used" in capsys.readouterr().out


# ---- rotation --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here: nothing of Python's own cleaning up may run in between."""


STAGES = ("_write_tensors", "save_weights", "write_manifest", "put_in_place", "rotate", "rmtree")


def test_what_a_killed_process_left_of_a_file_is_cleared_away(tmp_path):
    def fail(beside):
        beside.write_text("half")
        raise Killed

    (tmp_path / "config.yaml").write_text("old")
    with pytest.raises(Killed), disk.replacing(tmp_path / "config.yaml") as beside:
        fail(beside)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    with disk.replacing(tmp_path / "config.yaml") as beside:
        beside.write_text("new")
        shutil.copy(beside, tmp_path / ".config.yaml.1.tmp")  # as SIGKILL leaves it
    (tmp_path / ".lock").touch()
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "new"


@pytest.fixture(scope="module")
def parts(toy):
    from mokamm.training.engine import build_engine
    from mokamm.training.optimization import parameter_groups

    model, training = toy.build(), toy.config(Path("unused")).training
    return model, build_engine(model, parameter_groups(training, toy.parts_of(model)), training, toy.alone())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keep=st.integers(1, 3),
    events=st.lists(
        st.tuples(st.booleans(), st.sampled_from([None, None, *STAGES]), st.sampled_from([OSError, Killed]), st.booleans()),
        min_size=2, max_size=8,
    ),
)  # fmt: skip
def test_rotation_never_deletes_the_last_whole_one_nor_the_best(toy, parts, tmp_path_factory, keep, events):
    """events: is the step the best so far; which stage fails, with what, before or after it has done its work."""
    run, ranks = tmp_path_factory.mktemp("rotation"), toy.alone()
    for improved, stage, failure, after in events:
        checkpoint.sweep(run)  # as at every start
        before = checkpoint.find(run, "auto")
        state = checkpoint.read_state(before, {}) if before else checkpoint.TrainerState()
        state.step += 1
        if improved:
            state.best = {"step": state.step, "loss": 0.0, "accuracy": 0.0}
        with pytest.MonkeyPatch.context() as patch:
            if stage:
                owner = shutil if stage == "rmtree" else checkpoint
                patch.setattr(owner, stage, failing(getattr(owner, stage), failure, after))
            try:
                checkpoint.save(run, state, *parts, ranks, keep)
                done = True
            except (UserError, Killed, OSError):
                done = False
        newest = checkpoint.find(run, "auto")
        if done:
            assert newest == run / f"checkpoint-{state.step}"
            assert len(newest_first(run)) <= max(keep, 2)
        if before is not None:
            assert newest is not None
        for folder in newest_first(run):
            assert not manifest_problems(folder, NEEDED)
        if newest is not None and (best := checkpoint.read_state(newest, {}).best):
            assert (run / f"checkpoint-{int(best['step'])}").is_dir()


def failing(function, failure, after):
    def wrapped(*args, **options):
        if after and not (failure is Killed and function is shutil.rmtree):
            function(*args, **options)
        elif function is shutil.rmtree and Path(args[0]).is_dir():  # killed half-way through a folder
            for path in sorted(Path(args[0]).rglob("*"))[:1]:
                path.unlink()
        raise failure(28, "No space left on device")

    return wrapped
