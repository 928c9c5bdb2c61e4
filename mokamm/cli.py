"""The console command `mokamm`: a thin front door to the programs of this repository, which also run by their path.

    mokamm train CONFIG ...  =  python mokamm/train.py CONFIG ...

The programs are started by module name, so that nothing here imports another floor, torch or transformers.
"""

from __future__ import annotations

import runpy
import sys

from data.schema import nearest

# command -> module, what it does
COMMANDS = {
    "train": ("mokamm.train", "train, evaluate and report: CONFIG [dotted.key=value ...]"),
    "infer": ("mokamm.infer", 'ask a trained model: RUN [--video FILE] [--audio FILE] ... "question"'),
    "eval": ("eval.run", "score a trained model: BENCHMARK|all RUN [--limit N] [--control NAME]"),
    "compare": ("eval.compare", "train and test several methods, each at its best rate: CONFIG [--out DIR] [--jobs N]"),
    "data": ("data.miniworld", "make the miniature world: --out DIR --split train --num N"),
}


def usage() -> str:
    lines = [f"  {name:7} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: mokamm COMMAND ...", *lines, "`mokamm COMMAND --help` says more."])


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    command = arguments[0]
    if command not in COMMANDS:
        print(f"error: unknown command '{command}'{nearest(command, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    before = sys.argv
    sys.argv = [f"mokamm {command}", *arguments[1:]]
    try:
        runpy.run_module(COMMANDS[command][0], run_name="__main__", alter_sys=False)
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
