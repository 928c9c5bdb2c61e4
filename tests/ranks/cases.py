"""Many trainings in one launch: each is mokamm.train.train, as `mokamm/train.py` runs it, in one process group.

    deepspeed --num_gpus 2 --module tests.ranks.cases CASES.json         or torchrun -m, accelerate launch -m, python -m

CASES.json: a list of {"name", "overrides", "copy"}: overrides of configs/quickstart.yaml, and a checkpoint that is put
into the run folder beforehand, to go on from. What a case fails with is written to NAME.failed beside the run folders.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mokamm.config import load_config
from mokamm.training.launch import plain_environment
from mokamm.training.watch import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Case:
    """One training. name: its run folder. copy: run/checkpoint-N of an earlier case to resume from."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    copy: str | None = None


def settings(world: Path, folder: Path, **training: Any) -> dict[str, Any]:
    """Overrides common to all cases: the shipped base, mixed rows, two rows a micro batch of the whole, 20 steps."""
    values = {
        "max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 3e-4,
        "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "logging_steps": 1, "save_steps": 10, "report_to": [],
        "save_total_limit": None, "dataloader_num_workers": 0, "use_cpu": True, "deepspeed": None, "ddp_timeout": 300,
    }  # fmt: skip
    return {
        **{f"training.{key}": value for key, value in {**values, **training}.items()},
        "data.world": None,
        "data.media_dir": str(world),
        "data.train": [{"source": "messages", "path": "mixed.jsonl"}],
        "data.validation": [],
        "data.cache": {"dir": str(folder / "cache"), "max_gb": 1},
        "model.modalities.vision.segments": 4,
        "model.modalities.audio.segments": 4,
        "evaluation.benchmarks": [],
    }


def environment() -> dict[str, str]:
    """As at a user without a compiler, one thread a process; the launchers beside this Python, and none above it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "CC": "/bin/false", "CXX": "/bin/false", "OMP_NUM_THREADS": "1"}
    return {**plain_environment(), **own}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(command: list[str], cases: list[Case], folder: Path, timeout: float = 3600.0) -> str:
    """Run the cases below `folder` by a launcher's command; what it printed. A hang ends by `timeout` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    done = subprocess.run(
        [*command, str(folder / "cases.json")],
        env=environment(), cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
    failed = [f"{path.stem}: {path.read_text()}" for path in sorted(folder.glob("*.failed"))]
    assert done.returncode == 0, "\n".join([*failed, done.stdout[-3000:], done.stderr[-3000:]])
    return done.stdout


def losses(run: Path, kind: str = "train") -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


def weights(run: Path, part: str = "final") -> dict[str, str]:
    """sha256 of every file of weights in a run's result, by name. (PEFT writes sets into adapter_config.json unordered.)"""
    listed = json.loads((run / part / "MANIFEST.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in listed.items() if name.endswith(".safetensors")}


def run_case(case: Case, folder: Path, ranks: Any) -> None:
    """On every rank."""
    from mokamm.train import train
    from mokamm.training.launch import seed_everything

    run = folder / case.name
    if ranks.main:
        run.mkdir(parents=True)
        if case.copy:
            shutil.copytree(folder / case.copy, run / Path(case.copy).name)
    ranks.barrier()
    overrides = {**case.overrides, "training.output_dir": str(run)}
    config = load_config(ROOT / "configs/quickstart.yaml", [f"{k}={json.dumps(v)}" for k, v in overrides.items()])
    seed_everything(config.training.seed)  # as a launch of its own would begin
    train(config, run, ranks)


def main(path: Path) -> int:
    from mokamm.config_sections import TrainingConfig
    from mokamm.training import launch

    cases = [Case(**entry) for entry in json.loads(path.read_text())]
    first = {k.removeprefix("training."): v for k, v in cases[0].overrides.items() if k.startswith("training.")}
    ranks = launch.start(TrainingConfig(output_dir="unused", **first))
    failures = 0
    for case in cases:
        try:
            run_case(case, path.parent, ranks)
        except Exception:  # the other cases are still worth running, if all ranks fail alike
            failures += 1
            if ranks.main:
                (path.parent / f"{case.name}.failed").write_text(traceback.format_exc())
    launch.stop(ranks)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[-1])))  # deepspeed puts --local_rank=N before it
