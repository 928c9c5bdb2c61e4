"""A training on a disk that fills up and on one that turns read-only; prints one JSON object of what it saw.

unshare --user --map-root-user --mount python -m tests.faults.disk FOLDER     (mounts over FOLDER, for itself only)
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

from data.schema import UserError
from mokamm.training.checkpoint import NEEDED, newest_first
from mokamm.weights import manifest_problems
from tests.mokamm import toy_training as toy

SETTINGS = {"dropout": 0.2, "save_steps": 1, "save_total_limit": None, "report_to": ["tensorboard"]}


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def refused(run: Path) -> str:
    try:
        toy.run(run, toy.alone(), **SETTINGS)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def whole(run: Path) -> list[str]:
    return [folder.name for folder in newest_first(run) if not manifest_problems(folder, NEEDED)]


def main(folder: Path) -> None:
    toy.run(folder / "uninterrupted", toy.alone(), **SETTINGS)
    small = folder / "small"
    small.mkdir()
    mount("-t", "tmpfs", "-o", "size=900k", "none", str(small))
    run = small / "run"
    found: dict[str, object] = {"uninterrupted": toy.losses(folder / "uninterrupted"), "full": refused(run)}
    found["newest"] = str(newest_first(run)[0])
    found["left_half_written"] = [path.name for path in run.glob(".checkpoint*")]
    found["whole_before"] = whole(run)
    gc.collect()  # the refused training's lock, which its process would have closed by ending
    mount("-o", "remount,ro", str(small))
    found["read_only"] = refused(run)
    found["whole_after"] = whole(run)
    mount("-o", "remount,rw,size=8m", str(small))
    toy.run(run, toy.alone(), **SETTINGS)
    found["after_room_was_made"] = toy.losses(run)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
