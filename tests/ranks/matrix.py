"""Every method and stage under every ZeRO variant: train, save, resume, evaluate; compared with one plain process.

    python -m tests.ranks.matrix [--ranks 2] [--out DIR] [--only moka] [--variants zero2 zero3]
                                [--accumulation 1] [--checkpointing]

Per method, in one launch of all variants: 20 steps on the mixed rows of tests/ranks/rows.py, then the same run once more
from the checkpoint of step 10. Printed for each: the largest relative difference of the 20 losses from those of one
process without DeepSpeed; whether the resumed losses and the result's files are bit-identical; and how many of the
answers of eval/run.py are those of the plain run. Exit code 1 where a difference exceeds LIMIT or a resume is not exact.
Cost: some 10 minutes for five methods on two cores of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from data.miniworld.write import write_split
from tests.ranks.cases import ROOT, Case, free_port, launch, losses, settings, weights
from tests.ranks.rows import write_rows

VARIANTS = ["zero0", "zero1", "zero2", "zero3", "zero3_sharded", "zero1_offload", "zero2_offload", "zero3_offload"]
VARIANTS += ["ddp"]  # last: the first case of a launch decides whether DeepSpeed is made ready
# at 3e-4 rounding alone, one process with a batch of 2 and with 1 + 1, comes to 8e-5 (full) and 2e-5 (hira) in 20 steps;
# with CoTo a step of the projectors adds to that
SLOWER = {"training.learning_rate": 1e-4}
CALMER = {"training.projector_learning_rate": 1e-4}  # quickstart's: 5e-4
METHODS: dict[str, dict[str, Any]] = {
    "moka": {"adapter.method": "moka"},
    "multi_lora": {"adapter.method": "multi_lora"},
    "lora": {"adapter.method": "lora"},
    "dora": {"adapter.method": "dora"},
    "hira": {"adapter.method": "hira", **SLOWER},
    "peft_hira": {"adapter.method": "hira", "adapter.one_matmul": False, **SLOWER},
    "moka+coto": {"adapter.method": "moka", "adapter.coto": True},
    "lora+coto": {"adapter.method": "lora", "adapter.coto": True},
    "dora+coto": {"adapter.method": "dora", "adapter.coto": True},
    "hira+coto": {"adapter.method": "hira", "adapter.coto": True, **SLOWER, **CALMER},
    "lori_d": {"adapter.method": "lori_d"},
    "lori_s": {"adapter.method": "lori_s"},  # both phases
    "lori_moka_d": {"adapter.method": "lori_moka_d"},
    "lori_moka_s": {"adapter.method": "lori_moka_s"},
    "moka+depth": {"adapter.method": "moka", "adapter.stochastic_depth": True},
    "none": {"adapter.method": "none"},
    "full": {"adapter.method": "full", **SLOWER},
    "stage1": {"training.stage": 1, "training.init_from": None},
}
LIMIT = 1e-5


NOT_SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "zero0": ("zero1", {"zero_optimization": {"stage": 0}}),
    # else ZeRO-3 leaves tensors below 100,000 elements whole: all of the miniature LLM's
    "zero3_sharded": ("zero3", {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}),
}


def zero_json(variant: str, folder: Path) -> str | None:
    """The shipped DeepSpeed JSON, or one of NOT_SHIPPED: a shipped one with other entries; None for DDP."""
    if variant == "ddp":
        return None
    if variant not in NOT_SHIPPED:
        return str(ROOT / f"configs/deepspeed/{variant}.json")
    shipped, changes = NOT_SHIPPED[variant]
    config = {**json.loads((ROOT / f"configs/deepspeed/{shipped}.json").read_text()), **changes}
    path = folder / f"{variant}.json"
    path.write_text(json.dumps(config))
    return str(path)


def evaluated(run: Path, world: Path) -> list[str]:
    """The answers of a run to the first questions of the world's test split, by eval/run.py."""
    from eval.run import main

    test = world / "test"
    command = ["miniworld_avqa", str(run), "--path", str(test / "avqa.json"), "--media-dir", str(test), "--limit", "8"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
        assert main(command) == 0, told.getvalue()
    lines = (run / "predictions" / "miniworld_avqa.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


def run_method(
    method: str, variants: list[str], world: Path, folder: Path, ranks: int, **training: Any
) -> list[dict[str, Any]]:
    """One row of results a variant. The plain run has `training` too, but for gradient checkpointing."""
    own = settings(world / "train", folder, **training)
    own.update(METHODS[method])
    python = [sys.executable, "-m", "tests.ranks.cases"]
    launch(python, [Case("plain", {**own, "training.gradient_checkpointing": False})], folder / "one")
    shared = {**own, "training.per_device_train_batch_size": 2 // ranks}
    cases = []
    for variant in variants:
        overrides = {**shared, "training.deepspeed": zero_json(variant, folder)}
        cases.append(Case(variant, overrides))
        cases.append(Case(f"{variant}-resumed", overrides, copy=f"{variant}/checkpoint-10"))
    command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", free_port(), "--module", "tests.ranks.cases"]
    trouble = ""
    try:
        launch(command, cases, folder / "many")
    except AssertionError as error:
        trouble = str(error)
    plain = folder / "one" / "plain"
    expected, answers = losses(plain), evaluated(plain, world)
    return [result(method, variant, folder / "many", expected, answers, world, trouble) for variant in variants]


def result(
    method: str, variant: str, folder: Path, expected: list[float], answers: list[str], world: Path, trouble: str
) -> dict[str, Any]:
    run, resumed = folder / variant, folder / f"{variant}-resumed"
    row: dict[str, Any] = {"method": method, "variant": variant}
    if not (resumed / "final").is_dir():
        said = [
            p.read_text() for p in (folder / f"{variant}.failed", folder / f"{variant}-resumed.failed") if p.exists()
        ]
        return {**row, "failed": "\n".join(said) or trouble or "no result"}
    found = losses(run)
    given = evaluated(run, world)
    return {
        **row,
        "difference": max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True)),
        "resumed losses": losses(resumed) == found[10:],
        "resumed weights": weights(resumed) == weights(run),
        "answers": f"{sum(a == b for a, b in zip(answers, given, strict=True))}/{len(answers)}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.ranks.matrix", description="every method under every ZeRO variant")
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2))
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on the ranks")
    parser.add_argument("--only", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=VARIANTS)
    parser.add_argument("--out", type=Path, default=Path("runs/matrix"))
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    world = out / "world"
    for split in ("train", "test"):
        write_split(world, split, 6, workers=1)
    write_rows(world / "train", 40 * args.accumulation)
    bad = 0
    for method in args.only:
        training = {"gradient_accumulation_steps": args.accumulation, "gradient_checkpointing": args.checkpointing}
        for row in run_method(method, args.variants, world, out / method, args.ranks, **training):
            exact = row.get("resumed losses") and row.get("resumed weights")
            good = "failed" not in row and row["difference"] <= LIMIT and exact
            bad += not good
            print("ok  " if good else "BAD ", json.dumps(row), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
