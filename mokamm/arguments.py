"""What the command lines of several commands share: the configuration's arguments, numbers that have a least value,
and how the command was started."""

from __future__ import annotations

import argparse
import math
import sys


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The two arguments of every command that reads a configuration."""
    parser.add_argument("config", help="YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="values to use instead of the file's")


def started_as() -> list[str]:
    """The words before the arguments: `python eval/compare.py`, or `mokamm compare` (mokamm/cli.py)."""
    return ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else sys.argv[0].split()


def at_least_one(text: str) -> int:
    """A `type` of argparse: a whole number from 1."""
    try:
        if (value := int(text)) >= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; found {text}")


def above_zero(text: str) -> float:
    """A `type` of argparse: a finite number above 0."""
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0; found {text}")
