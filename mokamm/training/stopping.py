"""Ctrl-C and SIGTERM (a cluster's pre-emption): the run saves where it stands and leaves with an exit code of its own.

    first signal      noted; before the next step all ranks agree, save, and leave with 128 + signal: 130, 143
    a second signal   leaves at once, nothing saved

The agreement rides on the collective that counts a step's answer tokens: it costs nothing, and a signal that reached
one rank stops all of them. A thread listens, because the main thread may hang in a collective whose peer has gone.
Launchers pass on what the terminal has sent to every process already (deepspeed sends SIGTERM after a Ctrl-C), and
timeout(1) sends twice: what comes within ECHO seconds of the first is no second signal. The `deepspeed` command itself
passes nothing on: it dies, and its ranks would train on unseen. So a rank whose command has gone stops as well.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from data.schema import UserError
from mokamm.arguments import started_as

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 3.0  # seconds


class Stopped(Exception):
    """A signal ended the run after `step`; `folder` is the checkpoint to go on from, `code` the process's exit code."""

    def __init__(self, number: signal.Signals, step: int, folder: Path) -> None:
        super().__init__(f"stopped by {number.name} after step {step}, saved in {folder}")
        self.code, self.step, self.folder = 128 + number, step, folder


class BadStep(UserError):
    """A step that cannot be used ended the run (bad_steps.py); raised on every rank alike."""


class SignalWatch:
    """Inside the `with`, SIGINT and SIGTERM are noted instead of ending the process. tell: say so on stderr.

    Where Stopped leaves it, it stays until the process ends, so that a launcher's echo does not change the exit code.
    """

    def __init__(self, tell: bool = True) -> None:
        self.tell, self.first, self.since = tell, 0, 0.0
        self.command = deepspeed_command()

    def votes(self) -> list[float]:
        """One for the signal that this process got first, to be summed over the ranks."""
        if not self.first and self.command and not self.command.exists():
            self.first, self.since = signal.SIGTERM, time.monotonic()
            self._say("the deepspeed command has gone: the run saves after this step and ends")
        return [float(self.first == number) for number in SIGNALS]

    def __enter__(self) -> SignalWatch:
        self._thread = None
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before: dict[signal.Signals, Any] = {n: signal.signal(n, lambda *_: None) for n in SIGNALS}
        self._woken = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # written to by C, at any time
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is None or isinstance(error, Stopped):
            return
        signal.set_wakeup_fd(self._woken)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        while number := os.read(self._read, 1)[0]:
            if number not in SIGNALS:
                continue  # a worker's end, a window's size
            name = signal.Signals(number).name
            if not self.first:
                self.first, self.since = number, time.monotonic()
                self._say(
                    f"{name}: the run saves after this step and ends; again after {ECHO:g} s leaves at once, unsaved"
                )
            elif time.monotonic() - self.since > ECHO:
                self._say(f"{name} again: leaving at once")
                os._exit(128 + number)

    def _say(self, line: str) -> None:
        if self.tell:
            with suppress(OSError):  # nobody reads it any more
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())


def deepspeed_command() -> Path | None:
    """The /proc entry of the `deepspeed` command that started this rank's launcher; None without one on this machine."""
    try:
        status = Path(f"/proc/{os.getppid()}/stat").read_text()
        command = Path("/proc") / status.rpartition(")")[2].split()[1]  # the launcher's own parent
        words = (command / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return None
    return command if "deepspeed" in [Path(word).name for word in words[:2]] else None


def agreed(votes: list[float]) -> signal.Signals | None:
    """The signal to stop for, from the votes of all ranks; None to go on. SIGTERM comes before a Ctrl-C."""
    wanted = [number for number, count in zip(SIGNALS, votes, strict=True) if count]
    return wanted[-1] if wanted else None


def ignore_signals() -> None:
    """For the loader's workers: launchers and terminals signal them too, and what they hold is still wanted."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def command_to_go_on(config: str, overrides: list[str], auto: bool) -> str:
    """The command that was given, as far as a rank can know it. auto: it resumes by itself."""
    program = sys.argv[0] if sys.argv[0].endswith(".py") else ""
    arguments = [config, *overrides] if auto else [config, *overrides, "training.resume_from_checkpoint=auto"]
    here, world = (os.environ.get(name, "1") for name in ("LOCAL_SIZE", "WORLD_SIZE"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")
        start = ["torchrun", "--nproc_per_node", here, program]
    elif "LOCAL_SIZE" in os.environ:  # the deepspeed launcher's
        start = ["deepspeed", "--num_gpus", here, program]
    else:
        start = started_as()
    where = "" if here == world else f"  (the launcher as before, for all {world} processes)"
    return shlex.join([*start, *arguments]) + where
