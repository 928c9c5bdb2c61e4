"""What a disk does to a run: a full, read-only or failing one is told in one message, and a folder has one writer.

with writing(place, advice):      OSErrors inside, also those that torch and safetensors wrap, become one UserError
with replacing(path) as beside:   a file is written beside its place and renamed: it is whole, or what was there before
put_aside(folder, names)          what lies in it under these names goes to its previous-<n>/
lock = hold(run)                  the only training in this folder, until the lock is closed or its process ends
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from data.schema import UserError

LOCK = ".lock"
NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}  # a file lies where a folder should be
REFUSALS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EISDIR,
    *NO_FOLDER,
}  # fmt: skip


@contextmanager
def writing(place: Path, advice: str) -> Iterator[None]:
    """Turn what a disk refuses into a UserError: which place, why, how much room there is, what to do (`advice`)."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = errno.ENOENT if _is_no_place(place, error) else error_number(error)
        if number is None:
            raise
        about = "a file lies where a folder should be" if number in NO_FOLDER else _room(place)
        about = "a folder lies where a file should be" if number == errno.EISDIR else about
        raise UserError(f"{place} cannot be written: {os.strerror(number)} ({about}); {advice}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` once it is whole and on the disk; a failure leaves nothing."""
    if not path.parent.is_dir():  # safetensors would not name it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def put_aside(folder: Path, names: Iterable[str]) -> Path:
    """Move these out of the way of newer ones of their names; where they are then: the first of previous-1, -2, ..."""
    place = next(place for place in (folder / f"previous-{n}" for n in count(1)) if not place.exists())
    place.mkdir()
    for name in names:
        os.rename(folder / name, place / name)
    return place


def _is_no_place(place: Path, error: Exception) -> bool:
    """Whether the place itself, or a folder above it, cannot be made (in /proc); a file missing elsewhere is a bug."""
    return isinstance(error, FileNotFoundError) and Path(str(error.filename)) in (place, *place.parents)


def error_number(error: BaseException | None) -> int | None:
    """Which of REFUSALS is behind an exception, or behind what it arose from; None where no disk is at fault.

    torch.save raises a RuntimeError in whose context the OSError stands, safetensors says "(os error 28)".
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
        if number in REFUSALS:
            return number
        error = error.__cause__ or error.__context__
    return None


def _room(place: Path) -> str:
    folder = next((parent for parent in (place, *place.absolute().parents) if parent.is_dir()), Path("/"))
    with suppress(OSError):
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free there"
    return "its free space cannot be asked for"


def hold(run: Path) -> IO[str] | None:
    """Lock a run folder for this process; the kernel opens the lock when the process ends, however it ends.

    A killed launcher may leave its ranks training: a second start would write between their lines. The lock is a POSIX
    record lock, which data workers do not inherit. None where the file system knows no locks. Raises UserError.
    """
    advice = "choose a folder that can be written as training.output_dir"
    with writing(run / LOCK, advice):
        file = open(run / LOCK, "a+")  # noqa: SIM115 - held until the run ends
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{run}: another process is training in this folder (process {holder}); end it, or wait for it, or choose "
            "another training.output_dir"
        ) from None
    except OSError:
        file.close()
        return None
    with writing(run / LOCK, advice):
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
    return file
