"""Makes the miniature base from nothing:  python -m mokamm.mini.build [--out mokamm/mini] [--only PART ...]

    language  the LLM and its tokenizer, on text about worlds
    vision audio speech   the encoders
    stage1    the projectors, on captions and transcripts, through mokamm/train.py as a user would

A part that is already in the output folder is left as it is, so an interrupted build goes on where it was; `language` goes
on from its last state. Figures are appended to FIGURES.jsonl beside the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CLIPS, IMAGES, UTTERANCES = 3000, 3000, 3000
LANGUAGE_MINUTES = 30


def _torchrun(*command: str | Path) -> None:
    """One process a core, two at most: a small model gains little from threads."""
    ranks = str(min(2, os.cpu_count() or 1))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    subprocess.run([*launcher, *command], cwd=ROOT, check=True)


def _language(out: Path, work: Path) -> dict[str, float]:
    _torchrun("-m", "mokamm.mini.language", out, work, str(LANGUAGE_MINUTES))
    return json.loads((work / "language.json").read_text())


def _vision(out: Path, work: Path) -> dict[str, float]:
    from transformers import AutoTokenizer

    from mokamm.mini.perceive import train_vision

    return train_vision(out, AutoTokenizer.from_pretrained(out / "llm"), minutes=6)


def _audio(out: Path, work: Path) -> dict[str, float]:
    from mokamm.mini.perceive import train_audio

    return train_audio(out, minutes=4)


def _speech(out: Path, work: Path) -> dict[str, float]:
    from mokamm.mini.perceive import train_speech

    return train_speech(out, minutes=10)


def _stage1(out: Path, work: Path) -> dict[str, float]:
    from mokamm.mini.captions import write_captions

    write_captions(work / "captions", CLIPS, IMAGES, UTTERANCES)
    run = work / "stage1"
    settings = {
        "data.media_dir": work / "captions",
        "data.cache.dir": work / "cache",
        "training.output_dir": run,
        "model.llm.path": out / "llm",
        "model.modalities.vision.encoder.path": out / "vision",
        "model.modalities.audio.encoder.path": out / "audio.safetensors",
        "model.modalities.speech.encoder.path": out / "speech",
    }
    _torchrun("mokamm/train.py", "configs/mini/stage1.yaml", *(f"{key}={value}" for key, value in settings.items()))
    shutil.copytree(run / "final", out / "stage1")
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    return {"steps": last["step"], "loss": last["loss"]}


PARTS: dict[str, tuple[str, Callable[[Path, Path], dict[str, float]]]] = {
    "language": ("llm", _language),
    "vision": ("vision", _vision),
    "audio": ("audio.safetensors", _audio),
    "speech": ("speech", _speech),
    "stage1": ("stage1", _stage1),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mokamm.mini.build", description="Make the miniature base.")
    parser.add_argument("--out", type=Path, default=HERE, help="where the parts go (default: beside this file)")
    parser.add_argument("--work", type=Path, default=ROOT / "cache" / "miniature", help="states, data, features")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    asked = parser.parse_args()
    out, work = asked.out.resolve(), asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for name in asked.only:
        result, make = PARTS[name]
        if (out / result).exists():
            print(f"{name}: {result} is there; remove it to make it anew")
            continue
        began = time.monotonic()
        figures = make(out, work)
        row = {"part": name, "cores": os.cpu_count(), "minutes": round((time.monotonic() - began) / 60, 1), **figures}
        with open(out / "FIGURES.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row))


if __name__ == "__main__":
    main()
