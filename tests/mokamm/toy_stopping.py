"""Runs of the toy model that something goes wrong in: imported by test_stopping.py, and started by the launcher.

deepspeed --num_gpus 2 tests/mokamm/toy_stopping.py FOLDER zero1 zero2 zero3

For each stage a run with a row that overflows and is skipped; then, with zero2, a whole run, one that waits for a signal
while training, and one whose rank 1 gets a signal in the last validation. Both go on from what they saved, in the same
process, which ends with the exit code of the first stop.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mokamm.training import launch
from mokamm.training.checkpoint import STATE
from mokamm.training.loop import fit
from mokamm.training.resume import begin
from mokamm.training.stopping import Stopped

TOY = Path(__file__).with_name("toy_training.py")
ROW = 13  # of the toy's 22; its first token is its own
SKIPPING = {
    "max_steps": 6,
    "on_nan": "skip",
    "save_steps": 1,
    "save_total_limit": None,
    "load_best_model_at_end": False,
}
FREE_STEPS, ACCUMULATION = 3, 2  # steps before the run waits for a signal; the toy's accumulation


def _toy() -> Any:
    if "toy_training" not in sys.modules:
        spec = importlib.util.spec_from_file_location("toy_training", TOY)
        sys.modules["toy_training"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["toy_training"])
    return sys.modules["toy_training"]


toy = _toy()


def overflow(model: Any, size: float, sharp: float = 1.0) -> None:
    """Weights with which ROW's first token alone gives the projector's output that size; logits `sharp` times larger."""
    token = int(toy.encode(toy.samples(ROW + 1)[ROW]).input_ids[0])
    with torch.no_grad():
        first, second = model.projectors["vision"]
        first.weight[:, token] = size
        second.weight[0] = 1.0  # a sum of 32 of them
        model.llm.get_output_embeddings().weight.mul_(sharp)


def run(
    folder: Path,
    ranks: launch.Ranks,
    size: float = 0.0,
    sharp: float = 1.0,
    corpus: Any = None,
    dropout: float = 0.0,
    **training: Any,
) -> None:
    """As toy.run, with overflowing weights, and rows of one's own."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = toy.config(folder, **{**toy.FROM_STEP_ONE, **training})
    model = toy.build("lora", dropout)
    if size:
        overflow(model, size, sharp)
    launch.seed_everything(ranks.rank)
    found = corpus or toy.corpus(folder)
    fit(settings, model, toy.parts_of(model), found, ranks, begin(settings, found, ranks))


def signalled_in_validation(folder: Path) -> Any:
    """The toy's corpus, whose second validation row sends rank 1 a SIGTERM."""
    found, seen = toy.corpus(folder), []

    def encode(sample: Any) -> Any:
        seen.append(sample.id)
        if len(seen) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # until the listening thread has noted it
        return toy.encode(sample)

    found.validation.process = encode
    return found


def waiting(folder: Path, rows: int) -> Any:
    """The toy's corpus, whose rows after the first few wait until FOLDER/go exists."""
    found, seen = toy.corpus(folder), []

    def encode(sample: Any) -> Any:
        seen.append(sample.id)
        while len(seen) > rows and not (folder / "go").exists():
            time.sleep(0.02)
        return toy.encode(sample)

    found.train.process = encode
    return found


def stopped(start: Callable[[], None]) -> int:
    """The exit code of a run that a signal stops; notes where it saved."""
    try:
        start()
    except Stopped as stop:
        state = json.loads((stop.folder / STATE).read_text())
        (stop.folder.parent / "stopped.json").write_text(json.dumps({"folder": str(stop.folder), **state}))
        return stop.code
    raise AssertionError("no signal came")


def main(folder: Path, stages: list[str]) -> int:
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    json_of = {stage: str(toy.ROOT / f"configs/deepspeed/{stage}.json") for stage in stages}
    ranks = launch.start(toy.config(folder, deepspeed=json_of[stages[0]]).training)
    common = {"ranks": ranks, "per_device_train_batch_size": 1}
    for stage in stages:
        run(folder / stage, size=3e38, deepspeed=json_of[stage], **common, **SKIPPING)
    again = partial(run, deepspeed=json_of["zero2"], dropout=0.2, max_steps=8, save_steps=50, eval_steps=50, **common)
    again(folder / "whole")
    code = stopped(lambda: again(folder / "halved", corpus=waiting(folder / "halved", FREE_STEPS * ACCUMULATION)))
    again(folder / "halved")
    stopped(lambda: again(folder / "cut", corpus=signalled_in_validation(folder / "cut")))
    again(folder / "cut")
    launch.stop(ranks)
    launch.leave(code)
    return code


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(main(Path(arguments[0]), arguments[1:]))
