"""The miniature world of `data.world`: generated before training where a split is not there yet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from data.schema import UserError
from mokamm.config import WorldConfig
from mokamm.training.launch import plain_environment

REPOSITORY = Path(__file__).resolve().parents[2]
SPLITS = ("train", "validation", "test")


def make_world(world: WorldConfig) -> None:
    """Run `python -m data.miniworld` for every split that is missing, unfinished or of other numbers. Call it on one
    rank.
    """
    for split in SPLITS:
        folder = Path(world.dir) / split
        if _is_complete(folder / "DONE.json", getattr(world, split), world.seed):
            continue
        print(f"making the miniature world: {folder}, {getattr(world, split)} scenes", flush=True)
        command = [sys.executable, "-m", "data.miniworld", "--out", str(Path(world.dir).resolve()), "--split", split]
        command += ["--num", str(getattr(world, split)), "--seed", str(world.seed)]
        done = subprocess.run(command, cwd=REPOSITORY, env=plain_environment(), check=False)
        if done.returncode:
            raise UserError(
                f"the miniature world could not be made (exit code {done.returncode}); its own message stands above. "
                f"To try it alone, in "
                f"{REPOSITORY.name}/: python {' '.join(command[1:])}"
            )


def _is_complete(done: Path, number: int, seed: int) -> bool:
    try:
        made = json.loads(done.read_text())
    except (OSError, ValueError):
        return False
    return made.get("num", number) == number and made.get("seed", seed) == seed
