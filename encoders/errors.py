"""The error of this floor and the end of its messages; free of heavy imports, so that a CLI can name them early."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EncoderError(Exception):
    """A mistake that the user can mend: the message is complete and no traceback is needed."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names for an error message, the nearest one first: "; did you mean 'clip'? known: beats, clip"."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (f"; did you mean '{close[0]}'?" if close else ";") + " known: " + ", ".join(names)
