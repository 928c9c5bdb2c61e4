"""Checkpoints: folders that are whole or not there.

    RUN/checkpoint-N/
      adapter/ or llm/, projectors.safetensors     mokamm/weights.py
      optimizer-rank<r>.pt  rng-rank<r>.pt         one each rank, read with torch.load(weights_only=True)
      window-rank<r>.json                          sums since the last log line, so that the next one is the same
      trainer_state.json                           step, best, and what a resumed run must have in common with this one
      MANIFEST.json                                written last

A checkpoint is written as `.checkpoint-N.tmp` beside its place, flushed to disk and renamed, so that a folder with its
name is complete; one that goes is renamed before it is deleted. Where a rank cannot write, no rank goes on: a message,
and the earlier checkpoints stay. Rotation keeps `save_total_limit`, and always the newest and the best. What an earlier
run left in the same folder is moved to RUN/previous-<n>/ and never mixed up with the new run. On several nodes the run
folder must be shared.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.schema import UserError, listed
from mokamm.training.disk import put_aside, writing
from mokamm.training.engine import Engine
from mokamm.training.launch import Ranks
from mokamm.weights import (
    ADAPTER,
    LLM,
    MANIFEST,
    NO_FINGERPRINT,
    PROJECTORS,
    manifest_problems,
    save_weights,
    saved_tensors,
    share,
    write_manifest,
)

STATE = "trainer_state.json"
NEEDED = (STATE, PROJECTORS, "optimizer-rank0.pt", "rng-rank0.pt")  # what every manifest of a checkpoint lists
TEMPORARY, REPLACED, GONE = ".tmp", ".old", ".gone"  # being written, replaced, deleted; none outlives a `sweep`
# what a run leaves beside its checkpoints
RECORDS = (
    "config.yaml", "metrics.jsonl", "bad_samples.jsonl", "tensorboard", "wandb", "final", "predictions", "report",
    "README.md",
)  # fmt: skip


@dataclass
class TrainerState:
    """Where a run stands. best: {"step", "loss", "accuracy"} of the best validation so far."""

    step: int = 0
    best: dict[str, float] | None = None
    unvalidated: bool = False  # a signal cut this step's validation off: it comes first when the run goes on
    recent: list[float] = field(default_factory=list)  # losses of the last steps, for training.loss_spike
    bad_in_a_row: int = 0  # steps without an update, up to this one
    same: dict[str, Any] = field(default_factory=dict)  # must be equal when resuming


def step_of(folder: Path) -> int:
    """The N of checkpoint-N; -1 for another name."""
    step = folder.name.removeprefix("checkpoint-")
    return int(step) if step.isdecimal() else -1


def newest_first(run: Path) -> list[Path]:
    """A run's `checkpoint-N` folders, the highest N first."""
    folders = (folder for folder in run.glob("checkpoint-*") if folder.is_dir() and step_of(folder) >= 0)
    return sorted(folders, key=step_of, reverse=True)


# ---- save ------------------------------------------------------------------------------------------------------------


def save(
    run: Path,
    state: TrainerState,
    model: Any,
    engine: Engine,
    ranks: Ranks,
    keep: int | None,
    window: dict[str, float] | None = None,
) -> Path:
    """Write checkpoint-<state.step>; every rank must call it. Returns its folder.

    window: this rank's sums since the last log line. Raises UserError on every rank where the disk refuses one of them.
    """
    target = run / f"checkpoint-{state.step}"
    temporary = target.with_name(f".{target.name}{TEMPORARY}")
    weights = gathered(model, engine, ranks)

    def of_this_rank() -> None:
        _write_tensors(engine.state(), temporary / f"optimizer-rank{ranks.rank}.pt")
        _write_tensors(random_state(ranks), temporary / f"rng-rank{ranks.rank}.pt")
        (temporary / f"window-rank{ranks.rank}.json").write_text(json.dumps(window or {}))

    def of_the_run() -> None:
        save_weights(model, temporary, weights)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1))
        write_manifest(temporary)
        put_in_place(temporary, target)

    for write, by_all in ((lambda: _make_anew(temporary), False), (of_this_rank, True), (of_the_run, False)):
        _together(write if by_all or ranks.main else None, temporary, target, ranks)
    if ranks.main:
        rotate(run, keep, state)
    ranks.barrier()
    return target


def _together(write: Callable[[], None] | None, temporary: Path, target: Path, ranks: Ranks) -> None:
    """A barrier behind `write`; where it failed on any rank, the half-written folder goes and every rank raises."""
    failed: UserError | None = None
    try:
        with writing(target, _what_is_left(target)):
            if write:
                write()
    except UserError as error:
        failed = error
    (failures,) = ranks.sum([float(failed is not None)])
    if failures and ranks.main:
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
    if failures:
        raise failed or UserError(f"{target} is not written: another rank could not write its part, and says why")


def _what_is_left(target: Path) -> str:
    earlier = next((folder for folder in newest_first(target.parent) if (folder / MANIFEST).is_file()), None)
    there = f"{earlier} is untouched" if earlier else "there is no earlier checkpoint"
    again = "goes on from it" if earlier else "begins anew"
    return f"{there}: make room or mend the disk, then start the same command again, which {again}"


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_tensors(content: dict[str, Any], path: Path) -> None:
    """torch.save through a Python file: given a path, torch keeps to itself what the disk said."""
    with open(path, "wb") as file:
        torch.save(content, file)


def gathered(model: Any, engine: Engine, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The saved tensors on the CPU of rank 0, gathered one by one; empty on other ranks."""
    weights = {}
    for name, tensor in saved_tensors(model):
        with engine.gather([tensor]):
            if ranks.main:
                weights[name] = tensor.detach().cpu().clone()
    return weights


def put_in_place(temporary: Path, target: Path) -> None:
    """Flush a finished folder to disk and give it its name; one that is there already is replaced."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        if path.is_file():
            share(path)
        _flush(path)
    _flush(temporary)
    if target.exists():
        old = target.with_name(f".{target.name}{REPLACED}")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(run: Path, keep: int | None, state: TrainerState) -> None:
    """Delete all but `keep` checkpoints of this run (those up to its step): the newest, the best, then as new as can be.

    As in transformers: the best counts among them, and both stay whatever `keep` is.
    """
    if keep is None:
        return
    own = [folder for folder in newest_first(run) if step_of(folder) <= state.step]
    needed = {step_of(folder) for folder in own[:1]} | ({int(state.best["step"])} if state.best else set())
    for folder in sorted(own, key=lambda folder: step_of(folder) not in needed)[keep:]:  # stable: newest first
        if step_of(folder) not in needed:
            gone = folder.with_name(f".{folder.name}{GONE}")  # a killed process leaves no half of a checkpoint
            try:
                os.rename(folder, gone)
                shutil.rmtree(gone)
            except OSError as error:
                print(f"note: the old {folder} cannot be deleted: {error}", flush=True)


def sweep(run: Path) -> None:
    """Clear away what a killed process left half written or half deleted. Only for the process that holds the run."""
    for name in ("checkpoint-*", "final"):
        for folder in run.glob(f".{name}{REPLACED}"):
            target = run / folder.name[1:].removesuffix(REPLACED)
            if not target.exists():
                os.rename(folder, target)  # killed before the new one had its name
        for suffix in (TEMPORARY, REPLACED, GONE):
            for folder in run.glob(f".{name}{suffix}"):
                shutil.rmtree(folder, ignore_errors=True)
    for file in run.glob(f".*{TEMPORARY}"):
        if file.is_file():  # of disk.replacing
            file.unlink()


def write_final(run: Path, checkpoint: Path) -> Path:
    """RUN/final: the weights of a checkpoint (hard links where the disk can), without trainer state.

    Raises UserError where the checkpoint was altered since it was written, or the disk refuses.
    """
    problems = manifest_problems(checkpoint, NEEDED)
    if problems:
        raise UserError(
            f"the run's result cannot be taken from {checkpoint}: {problems[0]}\nstart the same command again: it "
            "trains no further and takes the result from the newest whole checkpoint"
        )
    with writing(run / "final", f"{checkpoint} is untouched: make room, then start the same command again"):
        temporary = run / f".final{TEMPORARY}"
        _make_anew(temporary)
        for name in (ADAPTER, LLM):
            if (checkpoint / name).is_dir():
                shutil.copytree(checkpoint / name, temporary / name, copy_function=_link)
        _link(checkpoint / PROJECTORS, temporary / PROJECTORS)
        write_manifest(temporary)
        put_in_place(temporary, run / "final")
    return run / "final"


def _link(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ---- resume ----------------------------------------------------------------------------------------------------------


def find(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint to go on from: the newest whole one (`auto`), a given folder, or none. Reads all of its files."""
    if wanted is None:
        return None
    if wanted != "auto":
        folder = Path(wanted)
        problems = manifest_problems(folder, NEEDED) if folder.is_dir() else [f"no such folder: {folder}"]
        if problems:
            raise UserError(
                listed("training.resume_from_checkpoint cannot be used:", problems)
                + "\nuse 'auto' for the newest whole checkpoint of the run, or null to start anew"
            )
        return folder
    for folder in newest_first(run):
        problems = manifest_problems(folder, NEEDED)
        if not problems:
            return folder
        print(f"note: {folder} is passed over, it is not whole: {problems[0]}", flush=True)
    return None


def best_is_lost(run: Path, state: TrainerState) -> bool:
    """Whether the checkpoint that was the best so far is not there any more, or not whole; says so."""
    if state.best is None:
        return False
    problems = manifest_problems(run / f"checkpoint-{int(state.best['step'])}", NEEDED)
    if problems:
        print(f"note: the best checkpoint so far cannot be used ({problems[0]}); a later one will be", flush=True)
    return bool(problems)


def set_aside(run: Path, step: int) -> None:
    """Move what another run left in this folder into previous-<n>/, before a run at `step` goes on in it.

    Those are the checkpoints beyond that step; from step 0 on also all records, so that previous-<n>/ is a whole run.
    """
    names = [folder.name for folder in newest_first(run) if step_of(folder) > step]
    names += [name for name in RECORDS if step == 0 and (run / name).exists()]
    if not names:
        return
    place = put_aside(run, names)
    print(f"note: what another run left in {run} is now in {place}: {', '.join(names)}", flush=True)


def read_state(folder: Path, same: dict[str, Any]) -> TrainerState:
    """The state in a checkpoint. UserError where this run differs in something that its steps depend on."""
    state = TrainerState(**json.loads((folder / STATE).read_text()))
    known = state.same.keys() & same.keys()  # an older version may not have known a key
    different = [line for key in same if key in known for line in _changed(key, state.same[key], same[key])]
    if different:
        raise UserError(
            listed(f"{folder} comes from another run than the one configured:", different)
            + "\ngo back to those values, or choose another training.output_dir (or "
            "training.resume_from_checkpoint=null, which starts anew in the same folder and moves the earlier run aside)"
        )
    return state


def _changed(key: str, there: Any, now: Any) -> list[str]:
    """A line for every value that differs; of sections, for every value in them."""
    if not isinstance(there, dict) or not isinstance(now, dict):
        of = " (of training.num_train_epochs or training.max_steps)" if key == "total steps" else ""
        return [] if there in (now, NO_FINGERPRINT) else [f"{key}{of}: {there!r} there, {now!r} now"]
    return [line for name in {**there, **now} for line in _changed(f"{key}.{name}", there.get(name), now.get(name))]


def restore(folder: Path, engine: Engine, ranks: Ranks) -> dict[str, float]:
    """Optimizer and random generators of this rank; returns its sums since the last log line, as given to `save`.

    The weights were loaded before the engine was built.
    """
    engine.load_state(torch.load(folder / f"optimizer-rank{ranks.rank}.pt", map_location="cpu", weights_only=True))
    set_random_state(torch.load(folder / f"rng-rank{ranks.rank}.pt", map_location="cpu", weights_only=True), ranks)
    window = folder / f"window-rank{ranks.rank}.json"
    return json.loads(window.read_text()) if window.is_file() else {}


def random_state(ranks: Ranks) -> dict[str, Any]:
    """States of all generators that training may draw from, in types that weights_only loading accepts."""
    version, python, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(python), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return state


def set_random_state(state: dict[str, Any], ranks: Ranks) -> None:
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], ranks.device)
