"""A scenario of the paper from beginning to end, in small: every recipe through the real launcher, with its own ZeRO JSON.

    python -m tests.recipes.run av_text|visual_text|speech_text --out DIR [--clips N] [--world DIR] [--steps SHARE]

    world --> data sets as published --> LLM trained on text (configs/text/instruct.yaml, adapter.method=full)
          --> mokamm doctor, deepspeed mokamm/train.py for each recipe --> benchmark, also blind --> infer.py

Checkpoints are small ones of the true architectures (checkpoints.py), and lie where the recipes look (scenarios.py).
Printed for each recipe: trained parameters, steps, mean training loss of the first and last fifth, validation loss,
seconds, peak memory of the process; then scores. Exit code 1 where a loss does not fall. Cost: 5 to 30 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from mokamm.training.watch import read_metrics
from tests.ranks.cases import environment, free_port
from tests.recipes import layouts
from tests.recipes.scenarios import ROOT, SCENARIOS, Recipe, Scenario, prepare, sizes

SPLITS = {"train": 1.0, "validation": 0.1, "test": 0.2}  # sizes, as shares of --clips


def call(command: list[str], folder: Path, **env: str) -> str:
    """Standard output of a command in FOLDER; what it says while it runs goes to FOLDER/log.txt too."""
    with open(folder / "log.txt", "a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(
            command,
            cwd=folder,
            env={**environment(), **env},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
        )
        log.write(done.stdout)
    if done.returncode:
        tail = "\n".join((folder / "log.txt").read_text().splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
    return done.stdout


def train(config: Path, overrides: list[str], folder: Path, threads: str) -> None:
    launcher = ["deepspeed", "--num_gpus", "1", "--master_port", free_port(), str(ROOT / "mokamm/train.py")]
    call([*launcher, str(config), *overrides], folder, OMP_NUM_THREADS=threads)


def teach_language(scenario: Scenario, folder: Path, steps: int, threads: str) -> None:
    """Train the random LLM on text and put it in its place."""
    training = {
        "output_dir": "runs/base", "max_steps": steps, "learning_rate": 2e-3, "eval_steps": steps, "save_steps": steps,
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "dataloader_num_workers": 1, "use_cpu": "true",
    }  # fmt: skip
    overrides = [f"training.{key}={value}" for key, value in training.items()]
    overrides += [f"model.llm.path={scenario.llm}", "adapter.method=full", "data.max_length=256"]
    train(ROOT / "configs/text/instruct.yaml", overrides, folder, threads)
    shutil.rmtree(folder / scenario.llm)
    shutil.copytree(folder / "runs/base/final/llm", folder / scenario.llm)


def result(run: Path, seconds: float) -> dict[str, Any]:
    """What a run's metrics say."""
    records = list(read_metrics(run / "metrics.jsonl"))
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    fifth = -(-len(losses) // 5)  # single steps of four rows differ by more than a run of 50 learns
    held_out = [record["loss"] for record in records if record["kind"] == "validation"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    return {
        "run": run.as_posix().partition("runs/")[2],
        "trained": config["versions"]["trained_parameters"],
        "steps": records[-1]["step"],
        "loss": [round(mean(losses[:fifth]), 3), round(mean(losses[-fifth:]), 3)],
        "validation": [round(loss, 3) for loss in held_out],
        "seconds": round(seconds),
        "memory_gb": max(record.get("memory_gb", 0) for record in records),
    }


def run_recipe(recipe: Recipe, folder: Path, share: float, threads: str) -> dict[str, Any]:
    overrides = sizes(recipe, max(2, round(recipe.steps * share)))
    call([sys.executable, "-m", "mokamm.doctor", str(recipe.path), *overrides], folder)
    start = time.monotonic()
    train(recipe.path, overrides, folder, threads)
    return result(folder / "runs" / recipe.name, time.monotonic() - start)


def scores(scenario: Scenario, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Of a stage-2 run, with its media and without: what the training's own evaluation found, or scenario.benchmark."""
    run, found = f"runs/{recipe.name}", {}
    script = [sys.executable, str(ROOT / "eval/run.py")]
    named = (
        [*scenario.benchmark[:1], run, "--path", scenario.benchmark[1], "--media-dir", scenario.benchmark[2]]
        if scenario.benchmark
        else ["all", run]
    )
    if scenario.benchmark:
        call([*script, *named], folder)
    call([*script, *named, "--control", "blind"], folder)
    for path in sorted((folder / run / "predictions").glob("*.metrics.json")):
        metrics = json.loads(path.read_text())
        found[path.name.removesuffix(".metrics.json")] = {
            key: metrics.get(key) for key in ("score", "measure", "rows", "bad", "unparsed")
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.recipes.run", description="a scenario's recipes on small checkpoints")
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    parser.add_argument("--clips", type=int, default=300, help="of the miniature world's training split")
    parser.add_argument("--world", type=Path, help="a world that is there already, instead of rendering one")
    parser.add_argument("--steps", type=float, default=1.0, help="share of the steps that each recipe takes by default")
    parser.add_argument("--text-steps", type=int, default=400, help="of the LLM's training on text")
    parser.add_argument("--threads", default=str(os.cpu_count()))
    args = parser.parse_args()
    scenario, folder = SCENARIOS[args.scenario], args.out.resolve()
    folder.mkdir(parents=True)
    world = args.world.resolve() if args.world else folder / "world"
    if not args.world:
        for split, part in SPLITS.items():
            number = str(max(4, round(args.clips * part)))
            command = ["-m", "data.miniworld", "--out", str(world), "--split", split, "--num", number]
            call([sys.executable, *command], folder)
    layouts.lay_out_text(world, folder)
    prepare(scenario, world, folder)
    start = time.monotonic()
    teach_language(scenario, folder, args.text_steps, args.threads)
    rows = [result(folder / "runs/base", time.monotonic() - start)]
    print(json.dumps(rows[0]), flush=True)
    for recipe in scenario.recipes:
        rows.append(run_recipe(recipe, folder, args.steps, args.threads))
        print(json.dumps(rows[-1]), flush=True)
        if "stage1" not in recipe.name:
            rows[-1]["scores"] = scores(scenario, recipe, folder)
            print(json.dumps(rows[-1]["scores"]), flush=True)
    asked = call(
        [
            sys.executable,
            str(ROOT / "mokamm/infer.py"),
            str(folder / "runs" / scenario.recipes[-1].name),
            *scenario.question,
            "--json",
        ],
        folder,
    )
    print(asked.strip(), flush=True)
    (folder / "result.json").write_text(
        json.dumps({"scenario": args.scenario, "runs": rows, "chat": json.loads(asked)}, indent=1)
    )
    return 0 if all(row["loss"][1] < row["loss"][0] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
