"""python -m data.miniworld --out DIR --split train --num 1000 [--seed 0] [--workers N]

Exit codes: 0 done; 2 a mistake told in one message; 130 or 143 stopped by Ctrl-C or SIGTERM, with nothing left behind.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any

from data.schema import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.miniworld", description="Render a split of the miniature world."
    )
    parser.add_argument("--out", required=True, help="folder that receives SPLIT/")
    parser.add_argument("--split", required=True, help="train, validation or test")
    parser.add_argument("--num", type=int, required=True, help="number of ten-second clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    asked = parser.parse_args(arguments)
    try:
        from data.miniworld.write import write_split

        folder = write_split(asked.out, asked.split, asked.num, asked.seed, asked.workers)
    except (UserError, ModuleNotFoundError) as error:
        hint = "; install it with `uv sync --group world`" if isinstance(error, ModuleNotFoundError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    print(folder)
    return 0


def stop(number: int, frame: Any) -> None:
    for signalled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signalled, signal.SIG_IGN)  # what is unfinished is being removed
    print("\nstopped", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":
    for signalled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signalled, stop)
    sys.exit(main())
