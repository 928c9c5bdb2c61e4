"""A disk cache of frozen encoders' features: one safetensors file per media item, safe with many writers.

A key hashes the media's content, the encoder's fingerprint, the preprocessing and VERSION, so nothing ever goes stale.
An entry is written beside its place and renamed into it, hence whole or absent; a checksum finds what a disk broke, and
a broken entry is deleted and counts as a miss. Features keep the encoder's own dtype: a hit equals the miss bit for bit.

The files in the folder never exceed `max_gb` (10^9 bytes), however many processes write: a writer holds the lock on the
file `lock`, which also holds their total, while it makes room and writes. Least recently used entries go first, by file
times. The kernel frees the lock of a writer that is killed; what it had half written counts, and is the first to go.

Cost: a hit reads one file and its checksum (about 1 ms per MB), without the lock; a scan of the folder happens at a
process's first write and when the bound is reached.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from encoders.base import EncoderError, Features

SUFFIX, TEMPORARY = ".safetensors", ".tmp"
VERSION = 2  # of the code from file to features: a change of decoding or preprocessing that alters them raises it
TOTAL_DIGITS = 20  # size of the lock file, which is counted too


class FeatureCache:
    """Get and put `Features` by key. Holds no open file, so it can be pickled into data loader workers."""

    def __init__(self, dir: str | Path, max_gb: float) -> None:
        if not max_gb > 0:
            raise EncoderError(f"feature cache: max_gb must be positive, found {max_gb}")
        self.dir, self.max_bytes = Path(dir), int(max_gb * 1e9)
        self._scanned = False  # whether this process has compared the noted total with the folder
        self._warned = False
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EncoderError(f"feature cache: cannot make the folder {self.dir}: {error}") from error

    @staticmethod
    def key(content_fp: str, encoder_fp: str, preprocessing: str) -> str:
        """sha256 of the three and VERSION, lengths included so that no two triples meet."""
        parts = (content_fp, encoder_fp, preprocessing, str(VERSION))
        return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()

    def get(self, key: str) -> Features | None:
        """The entry, on the CPU, or None. A hit marks the entry as used; a broken entry is removed."""
        path = self._path(key)
        try:
            found = _read(path)
        except FileNotFoundError:
            return None
        except Exception:  # any damage at all: header, tensor, checksum
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(path)
        return found

    def put(self, key: str, features: Features) -> None:
        """Store; an entry that exists is kept as it is. A full or failing disk is warned about once, never fatal."""
        path = self._path(key)
        if path.exists():
            return
        content = _serialised(features)
        try:
            path.parent.mkdir(exist_ok=True)
            with self._locked() as lock:
                if not path.exists() and self._make_room(lock, len(content)):
                    _write_whole(path, content)
        except OSError as error:
            if not self._warned:
                warnings.warn(f"feature cache {self.dir}: not written ({error}); going on without", stacklevel=2)
            self._warned = True

    def total_bytes(self) -> int:
        """Size of all entries, and of what killed writers left, now."""
        return sum(size for _, size, _ in self._scan())

    def _path(self, key: str) -> Path:
        return self.dir / key[:2] / f"{key}{SUFFIX}"

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The lock file, open and held against other writers: threads, processes, and (where flock goes so far) hosts."""
        with os.fdopen(os.open(self.dir / "lock", os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _make_room(self, lock: BinaryIO, size: int) -> bool:
        """Count `size` more bytes in, removing least recently used entries where the bound asks; False: too large."""
        room = self.max_bytes - TOTAL_DIGITS - size
        if room < 0:
            return False
        noted = lock.read(TOTAL_DIGITS)
        total = int(noted) if self._scanned and noted.isdigit() else None
        if total is None or total > room:
            total = self._evict(room)
        self._scanned = True
        lock.seek(0)
        lock.write(b"%0*d" % (TOTAL_DIGITS, total + size))  # before the entry: a writer killed now leaves it too high
        return True

    def _evict(self, limit: int) -> int:
        """Remove the oldest entries until `limit` holds (then on to 90 % of it, to be rare); the bytes that remain."""
        entries = sorted(self._scan())
        total = sum(size for _, size, _ in entries)
        if total <= limit:
            return total
        for _, size, path in entries:
            path.unlink(missing_ok=True)
            total -= size
            if total <= 0.9 * limit:
                break
        return total

    def _scan(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every entry; of what a killed writer left, the last use is 0."""
        found = []
        for folder in self.dir.iterdir():
            if not (folder.is_dir() and len(folder.name) == 2):
                continue
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):  # another process was faster
                    status = entry.stat()
                    if entry.name.endswith((SUFFIX, TEMPORARY)):
                        used = 0.0 if entry.name.endswith(TEMPORARY) else status.st_mtime
                        found.append((used, status.st_size, Path(entry.path)))
        return found


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _serialised(features: Features) -> bytes:
    from safetensors.torch import save

    tensors = {"features": features.features, "mask": features.mask}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, metadata={"crc32": _checksum(tensors)})


def _write_whole(path: Path, content: bytes) -> None:
    """Beside its place, then renamed into it."""
    temporary = path.with_suffix(TEMPORARY)  # one writer at a time: no other can have this name
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> Features:
    """Raises FileNotFoundError for a miss and something else for damage."""
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(path)
    with safe_open(str(path), framework="pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in ("features", "mask")}
        expected = (opened.metadata() or {}).get("crc32")
    if _checksum(tensors) != expected:
        raise ValueError(f"{path}: checksum differs")
    return Features(tensors["features"], tensors["mask"])
