"""A disk cache of frozen encoders' features: one safetensors file per media item, safe with many writers.

A key hashes the media's content, the encoder's fingerprint and the preprocessing, so nothing ever goes stale. An entry
is written beside its place and renamed into it, hence whole or absent; a checksum finds what a disk broke, and a broken
entry is deleted and counts as a miss. Features keep the encoder's own dtype: a hit equals the miss bit for bit.

The folder is bounded by `max_gb` (10^9 bytes): least recently used entries go first, by file times, so that several
processes agree without talking. One writer never exceeds the bound; W writers look at the folder again after each
twentieth of the bound that they write, so that together they may exceed it by about W/20 for a while.

Cost: a hit reads one file and its checksum (about 1 ms per MB); a scan of the folder happens at the first write and
when the bound is near.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from encoders.base import EncoderError, Features

SUFFIX, TEMPORARY = ".safetensors", ".tmp"
ABANDONED_SECONDS = 3600.0  # a temporary file this old belongs to a writer that was killed


class FeatureCache:
    """Get and put `Features` by key. Holds no open file, so it can be pickled into data loader workers."""

    def __init__(self, dir: str | Path, max_gb: float) -> None:
        if not max_gb > 0:
            raise EncoderError(f"feature cache: max_gb must be positive, found {max_gb}")
        self.dir, self.max_bytes = Path(dir), int(max_gb * 1e9)
        self._bytes: int | None = None  # the folder's size at the last look, plus what was written since
        self._written = 0  # since the last look
        self._warned = False
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EncoderError(f"feature cache: cannot make the folder {self.dir}: {error}") from error

    @staticmethod
    def key(content_fp: str, encoder_fp: str, preprocessing: str) -> str:
        """sha256 of the three, lengths included so that no two triples meet."""
        parts = (content_fp, encoder_fp, preprocessing)
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
        temporary = path.parent / f".{key}.{os.getpid()}.{uuid.uuid4().hex}{TEMPORARY}"
        try:
            path.parent.mkdir(exist_ok=True)
            size = _write(temporary, features)
            if self._make_room(size):
                temporary.replace(path)
        except OSError as error:
            if not self._warned:
                warnings.warn(f"feature cache {self.dir}: not written ({error}); going on without", stacklevel=2)
            self._warned = True
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def total_bytes(self) -> int:
        """Size of all entries now."""
        return sum(size for _, size, _ in self._scan())

    def _path(self, key: str) -> Path:
        return self.dir / key[:2] / f"{key}{SUFFIX}"

    def _make_room(self, size: int) -> bool:
        """Count `size` more bytes in, removing least recently used entries where the bound asks; False: too large."""
        if size > self.max_bytes:
            return False
        if self._bytes is None or self._bytes + size > self.max_bytes or self._written > self.max_bytes / 20:
            self._bytes, self._written = self._evict(self.max_bytes - size), 0
        self._bytes += size
        self._written += size
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
        """(last use, bytes, path) of every entry; abandoned temporary files are removed on the way."""
        found = []
        for folder in self.dir.iterdir():
            if not (folder.is_dir() and len(folder.name) == 2):
                continue
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):  # another process was faster
                    status = entry.stat()
                    if entry.name.endswith(SUFFIX):
                        found.append((status.st_mtime, status.st_size, Path(entry.path)))
                    elif entry.name.endswith(TEMPORARY) and time.time() - status.st_mtime > ABANDONED_SECONDS:
                        Path(entry.path).unlink(missing_ok=True)
        return found


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _write(path: Path, features: Features) -> int:
    from safetensors.torch import save

    tensors = {"features": features.features, "mask": features.mask}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(tensors, metadata={"crc32": _checksum(tensors)})
    path.write_bytes(content)
    return len(content)


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
