"""kill -9 at random moments, resume, compare:  python -m tests.faults.kill CASE [--times 100] [--seed 0] [--json]

A small training (tests/mokamm/toy_training.py: the real loop, real files) is started, killed with all of its processes
at a random moment, started again by the same call with `resume_from_checkpoint: auto`, and so on until it is done; then
the next one, until `--times` kills are spent. Half of the moments are drawn from the time of a whole run, half from the
time inside a phase that was drawn first, so that short phases (the manifest, the renaming) are hit too. With two ranks,
a third of the kills takes rank 0 alone and a third rank 1 alone, as a system short of memory does.

After every kill:  each folder named checkpoint-N is whole; the newest is no older than the last save that had finished;
                   the best one is whole; metrics.jsonl has each step once, equal to the uninterrupted run's
After every run:   every record, weight, optimizer state and generator is bit-identical to the uninterrupted run's

A start is a fork of this process, which has imported the libraries (12 s); `--launcher` starts the ranks with the
deepspeed command instead. Exit code 1 where anything differed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMON = {  # so large a rate that the best checkpoint is not the newest
    "max_steps": 24, "save_steps": 2, "eval_steps": 3, "save_total_limit": 2, "learning_rate": 0.2, "warmup_steps": 4,
}  # fmt: skip
HARD = {"dropout": 0.2, "gradient_accumulation_steps": 3, "logging_steps": 3}  # log lines straddle saves
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {**HARD, "bf16": True, "dataloader_num_workers": 2},
    "draws": {**HARD, "draws": True, "group_by_length": True, "max_grad_norm": 0.1},
    "full": {"method": "full", "dropout": 0.0, "gradient_checkpointing": True},
    "ddp": {**HARD, "ranks": 2},
    "zero2": {**HARD, "ranks": 2, "deepspeed": str(ROOT / "configs/deepspeed/zero2.json")},
    "zero3": {**HARD, "ranks": 2, "deepspeed": str(ROOT / "configs/deepspeed/zero3.json")},
    "zero2-bf16": {**HARD, "ranks": 2, "bf16": True, "deepspeed": str(ROOT / "configs/deepspeed/zero2.json")},
    "zero3-bf16": {**HARD, "ranks": 2, "bf16": True, "deepspeed": str(ROOT / "configs/deepspeed/zero3.json")},
}
TIMES = ("tokens_per_second", "data_wait_share", "memory_gb", "seconds")  # of a record: what no two runs share
LONGEST = 3600  # seconds that a training may take from one kill to the next


class Fault(Exception):
    """The training did not do what it promises."""


# ---- a training ------------------------------------------------------------------------------------------------------


def train(case: str, folder: Path, trace_file: Path) -> None:
    """What a started process does: the whole training, or what is left of it, and final/."""
    from mokamm.training import checkpoint, launch
    from tests.faults.trace import Trace, follow
    from tests.mokamm import toy_training as toy

    settings = {**COMMON, **CASES[case]}
    settings.pop("ranks", None)
    deepspeed = settings.get("deepspeed")
    ranks = launch.start(toy.config(folder, deepspeed=deepspeed, bf16=settings.get("bf16", False)).training)
    if ranks.main:
        follow(Trace(trace_file), toy)
    _, best = toy.run(folder, ranks, **settings)
    if ranks.main:
        checkpoint.write_final(folder, best)
    launch.stop(ranks)


@dataclass
class Start:
    """Started processes: those of the ranks, and the process group to which they belong."""

    group: int
    ranks: list[int]
    codes: dict[int, int] = field(default_factory=dict)  # of those that have ended

    def ended(self) -> list[int]:
        """Exit codes so far; [] while any rank runs on."""
        for pid in set(self.ranks) - set(self.codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return list(self.codes.values()) if len(self.codes) == len(self.ranks) else []

    def kill(self, victims: list[int] | None, patience: float = 120.0) -> bool:
        """SIGKILL to some ranks, or to the whole group; whether the others then ended by themselves."""
        alone = True
        if victims is not None:
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + patience
            while not self.ended() and time.monotonic() < until:
                time.sleep(0.01)
            alone = bool(self.ended())
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        while not self.ended():
            time.sleep(0.001)
        return alone


def fork(case: str, folder: Path, trace_file: Path, log: Path) -> Start:
    """Start the ranks as forks of this process, each with a launcher's variables where there are several."""
    world, port = CASES[case].get("ranks", 1), _free_port()
    pids: list[int] = []
    sys.stdout.flush()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _become(rank, world, port, pids[0] if pids else 0, log)
            code = 1
            try:
                train(case, folder, trace_file)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    return Start(pids[0], pids)


def _become(rank: int, world: int, port: int, group: int, log: Path) -> None:
    os.setpgid(0, group)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def launched(case: str, folder: Path, trace_file: Path, log: Path) -> Start:
    """Start the ranks with the deepspeed command; it stands for all of them, in a group of its own."""
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(CASES[case].get("ranks", 1)),
        "--master_port", str(_free_port()), "--module", "tests.faults.kill", case, "--train", str(folder),
        str(trace_file),
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with open(log, "a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, process_group=0, env={**os.environ, "PATH": path}
        )
    return Start(process.pid, [process.pid])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---- what must hold --------------------------------------------------------------------------------------------------


def records(folder: Path) -> list[dict[str, Any]]:
    from mokamm.training.watch import read_metrics

    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def inspect(folder: Path, saved: int, expected: list[dict[str, Any]]) -> None:
    """What must hold of a run's folder at any moment. saved: the step of the last save that had finished."""
    from mokamm.training.checkpoint import NEEDED, STATE, newest_first, step_of
    from mokamm.weights import manifest_problems

    folders = newest_first(folder)
    for checkpoint in folders:
        if problems := manifest_problems(checkpoint, NEEDED):
            raise Fault(f"a folder with a checkpoint's name is not whole: {problems}")
    newest = step_of(folders[0]) if folders else 0
    if newest < saved:
        raise Fault(f"the newest checkpoint is of step {newest}, a save of step {saved} had finished")
    if folders:
        best = json.loads((folders[0] / STATE).read_text())["best"]
        if best and not (folder / f"checkpoint-{int(best['step'])}").is_dir():
            raise Fault(f"the best checkpoint, of step {int(best['step'])}, is gone")
    found = records(folder)
    if found != expected[: len(found)]:
        raise Fault(f"records differ: {_first_difference(found, expected)}")


def compare(folder: Path, reference: Path, last: int) -> None:
    """Every record, and every byte of the last checkpoint and of final/, but for how long things took."""
    from mokamm.weights import MANIFEST

    found, expected = records(folder), records(reference)
    if found != expected:
        raise Fault(f"records differ: {_first_difference(found, expected)}")
    for name in (f"checkpoint-{last}", "final"):
        ours, theirs = (json.loads((run / name / MANIFEST).read_text())["files"] for run in (folder, reference))
        different = [file for file in {**ours, **theirs} if ours.get(file) != theirs.get(file)]
        different = [file for file in different if not file.startswith("window-")]  # it holds seconds
        if different:
            raise Fault(f"{folder / name}: {different} differ from the uninterrupted run's")


def _first_difference(found: list[Any], expected: list[Any]) -> str:
    for a, b in zip(found, expected, strict=False):
        if a != b:
            return f"{a} instead of {b}"
    return f"{len(found)} instead of {len(expected)}"


# ---- the moments -----------------------------------------------------------------------------------------------------


class Killer:
    """Starts, kills and compares; counts what it did."""

    def __init__(self, case: str, place: Path, seed: int, launcher: bool) -> None:
        self.case, self.place, self.draw = case, place, random.Random(seed)
        self.start = launched if launcher else fork
        self.world = 1 if launcher else CASES[case].get("ranks", 1)  # the launcher's ranks are killed together
        self.killed: Counter[str] = Counter()  # by phase
        self.alone: Counter[str] = Counter()  # by rank, for kills of one rank
        self.hung = self.runs = self.begun_anew = 0
        self.expected: list[dict[str, Any]] = []
        self.reference = place / "uninterrupted"

    def prepare(self) -> None:
        """The uninterrupted run, and how long its phases take."""
        began = time.monotonic()
        start, trace = self._begin("uninterrupted")
        self._wait(start, "uninterrupted")
        self.whole_seconds = time.monotonic() - began
        self.seconds = {phase: trace.mean_seconds(phase) for phase in _phases() if trace.entries(phase)}
        self.expected = records(self.reference)

    def run(self, times: int) -> None:
        """One training, killed until it is done or `times` kills are spent in all."""
        self.runs += 1
        name = f"run-{self.runs}"
        while True:
            start, trace = self._begin(name)
            if sum(self.killed.values()) < times and self._reached(start, trace):
                self._kill(start, trace)
                inspect(self.place / name, trace.saved, self.expected)
                continue
            self._wait(start, name)
            break
        compare(self.place / name, self.reference, COMMON["max_steps"])
        self.begun_anew += len(list((self.place / name).glob("previous-*")))
        shutil.rmtree(self.place / name)
        print(f"{sum(self.killed.values())} kills, {self.runs} trainings compared", file=sys.stderr, flush=True)

    def _begin(self, name: str) -> tuple[Start, Any]:
        from tests.faults.trace import Trace

        (self.place / name).mkdir(exist_ok=True)
        trace = Trace(self.place / f"{name}.trace")
        trace.clear()
        return self.start(self.case, self.place / name, self.place / f"{name}.trace", self.place / f"{name}.log"), trace

    def _reached(self, start: Start, trace: Any) -> bool:
        """Wait for a random moment; False where the training ended before."""
        if self.draw.random() < 0.5:
            moment = time.monotonic() + self.draw.uniform(0, self.whole_seconds)
        else:
            phase, entry = self.draw.choice(list(self.seconds)), self.draw.randint(1, 4)
            while trace.entries(phase) < entry and not start.ended():
                time.sleep(0.0002)
            moment = time.monotonic() + self.draw.uniform(0, self.seconds[phase])
        while time.monotonic() < moment and not start.ended():
            time.sleep(0.0002)
        return not start.ended()

    def _kill(self, start: Start, trace: Any) -> None:
        victim = self.draw.randrange(-1, self.world) if self.world > 1 else -1
        phase = trace.phase  # read just before; what it says afterwards may be the survivors' work
        if victim < 0:
            start.kill(None)
            phase = trace.phase
        else:
            self.alone[f"rank {victim}"] += 1
            self.hung += not start.kill([start.ranks[victim]])
        self.killed[phase] += 1

    def _wait(self, start: Start, name: str) -> None:
        until = time.monotonic() + LONGEST
        while not (codes := start.ended()):
            if time.monotonic() > until:
                start.kill(None)
                raise Fault(f"the training does not end; see {self.place / name}.log")
            time.sleep(0.01)
        if any(codes):
            raise Fault(f"exit codes {codes}:\n{(self.place / f'{name}.log').read_text()[-3000:]}")


def _phases() -> tuple[str, ...]:
    from tests.faults.trace import PHASES

    return PHASES


def report(killer: Killer, seconds: float) -> dict[str, Any]:
    return {
        "case": killer.case,
        "kills": sum(killer.killed.values()),
        "by_phase": dict(killer.killed.most_common()),
        "one_rank_alone": dict(killer.alone),
        "other_rank_had_to_be_ended": killer.hung,
        "trainings_compared": killer.runs,
        "begun_anew_before_a_first_checkpoint": killer.begun_anew,
        "records_compared_each": len(killer.expected),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--train", nargs=2, type=Path, help=argparse.SUPPRESS)  # started by --launcher
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CC="/bin/false", CXX="/bin/false")
    if args.train:
        train(args.case, *args.train)
        return
    if not args.launcher:
        _import_all(args.case)
    place = Path(tempfile.mkdtemp(prefix="mokamm-kill-"))
    killer, began = Killer(args.case, place, args.seed, args.launcher), time.monotonic()
    try:
        killer.prepare()
        while sum(killer.killed.values()) < args.times:
            killer.run(args.times)
    except Fault as fault:
        print(json.dumps(report(killer, time.monotonic() - began)), file=sys.stderr)
        sys.exit(f"FAULT in {place}: {fault}")
    shutil.rmtree(place)
    found = report(killer, time.monotonic() - began)
    print(json.dumps(found) if args.json else "\n".join(f"{key}: {value}" for key, value in found.items()))


def _import_all(case: str) -> None:
    import peft  # noqa: F401
    import transformers  # noqa: F401

    if CASES[case].get("deepspeed"):
        import deepspeed  # noqa: F401
    from mokamm.training import finish  # noqa: F401
    from tests.mokamm import toy_training

    toy_training.build()


if __name__ == "__main__":
    main()
