"""The miniature world of `data.world`: generated before training where a split is not there yet."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.miniworld.write import SPLITS, Request, lacking
from data.schema import UserError
from mokamm.config import ROOT
from mokamm.config_sections import WorldConfig
from mokamm.training.launch import run_program


def make_world(world: WorldConfig) -> None:
    """Run `python -m data.miniworld` for every split that is not there; call it on one rank.

    Raises UserError where a folder holds another world: other numbers, another seed, or of another version.
    """
    for split in SPLITS:
        folder, wanted = Path(world.dir) / split, asdict(Request(split, getattr(world, split), world.seed))
        found = _made(folder)
        if folder.exists() and found != wanted:
            raise UserError(
                f"{folder} holds another miniature world than data.world asks for: {found or 'no DONE.json'} there, "
                f"{wanted} wanted. Delete that folder (rm -r {folder}) to have it made anew, or choose another "
                "data.world.dir"
            )
        if found == wanted and (not lacking(folder) or not os.access(folder, os.W_OK)):
            continue  # what an older one lacks is text, and quickly added
        print(f"making the miniature world: {folder}, {getattr(world, split)} scenes", flush=True)
        command = [sys.executable, "-m", "data.miniworld", "--out", str(Path(world.dir).resolve()), "--split", split]
        command += ["--num", str(getattr(world, split)), "--seed", str(world.seed)]
        if code := run_program(command, ROOT):
            raise UserError(
                f"the miniature world could not be made (exit code {code}); its own message stands above. "
                f"To try it alone, in {ROOT.name}/: python {' '.join(command[1:])}"
            )


def _made(folder: Path) -> dict[str, Any] | None:
    """What a split was made from; None where it does not say."""
    try:
        return json.loads((folder / "DONE.json").read_text())
    except (OSError, ValueError):
        return None
