"""Libraries kept from talking about themselves, and all but a program's own result kept off standard output."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def quiet(errors_alone: bool = False) -> None:
    """For the whole process: no progress bars of libraries, nothing of what they plan for their own future.

    errors_alone: none of transformers' warnings either, where standard error is for errors.
    """
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)  # between libraries, nothing that a user can act on
    logging.disable_progress_bar()
    if errors_alone:
        logging.set_verbosity_error()


class _Outliving(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """For the whole process: what a reader that has left would have read is dropped.

    A Ctrl-C ends the `tee` of `train.py CONFIG | tee log`, too, and a run that is to save must not fall over its next line.
    """
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # started with it closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process lives
            continue
        stream.flush()
        raw = _Outliving(stream.fileno(), "w", closefd=False)
        lasting = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True)
        setattr(sys, name, lasting)


@contextmanager
def stdout_kept_clean(keep: bool) -> Iterator[None]:
    """While it holds, what anything (a library, a subprocess) writes to standard output goes to standard error."""
    if not keep:
        yield
        return
    sys.stdout.flush()
    python_stdout, saved = sys.stdout, os.dup(1)
    try:
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = python_stdout
        os.dup2(saved, 1)
        os.close(saved)
