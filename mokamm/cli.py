"""The console command `mokamm`: a thin front door to the programs of this repository, which also run by their path.

    mokamm train CONFIG ...  =  python mokamm/train.py CONFIG ...

The programs are started by module name, so that nothing here imports another floor, torch or transformers.
"""

from __future__ import annotations

import os
import runpy
import sys

from data.schema import nearest

# command -> module, what it does
COMMANDS = {
    "train": ("mokamm.train", "train, evaluate and report: CONFIG [dotted.key=value ...]"),
    "infer": ("mokamm.infer", 'ask a trained model: RUN [--video FILE] [--audio FILE] ... "question"'),
    "eval": ("eval.run", "score a trained model: BENCHMARK|all RUN [--limit N] [--control NAME]"),
    "score": ("eval.score", "score a file of predictions: BENCHMARK --predictions FILE [--annotations FILE]"),
    "compare": ("eval.compare", "train and test several methods, each at its best rate: CONFIG [--out DIR] [--jobs N]"),
    "advise": ("mokamm.advise", "learning rate, rank, targets, batch and memory of a CONFIG, and why"),
    "doctor": ("mokamm.doctor", "what a CONFIG needs and whether it is there; its true shapes"),
    "lori-mask": (
        "mokamm.lori_mask",
        "cut a LoRI mask from a trained LoRI-D: RUN_OR_ADAPTER --sparsity 0.9 --out FILE",
    ),
    "convert": ("mokamm.convert", "adapters, masks and BEATs from other formats: SOURCE [OUT] [--dry-run]"),
    "data check": ("mokamm.datacheck", "walk a config's data without training: CONFIG [--limit N] [key=value ...]"),
    "data make": ("data.miniworld", "make the miniature world: --out DIR --split train --num N"),
}


def usage() -> str:
    lines = [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: mokamm COMMAND ...", *lines, "`mokamm COMMAND --help` says more."])


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    words = 2 if any(name.startswith(f"{arguments[0]} ") for name in COMMANDS) else 1  # `mokamm data check`
    if words == 2 and arguments[1:2] in ([], ["-h"], ["--help"]):
        print(usage())
        sys.exit(0 if arguments[1:] else 2)
    command = " ".join(arguments[:words])
    if command not in COMMANDS:
        print(f"error: unknown command '{command}'{nearest(command, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    before = sys.argv
    sys.argv = [f"mokamm {command}", *arguments[words:]]
    try:
        run(COMMANDS[command][0])
    except BrokenPipeError:  # `mokamm advise CONFIG | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written at exit
        sys.exit(141)  # as a shell has it
    except KeyboardInterrupt:  # of a program that has nothing to tell of it
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    finally:
        sys.argv = before


def run(module: str) -> None:
    """A program to its end, all of its output written."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    main()
