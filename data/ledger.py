"""The list of rows that could not be used: `bad_samples.jsonl`, one JSON object a line.

    {"source": "avqa", "row": 17, "id": "00000123-4", "reason": "videos/00000123.mp4: not found; ..."}

Nothing is dropped in silence, and nothing stops a long run but a share of bad rows above `max_bad_fraction`. Several
workers and ranks write to one file: each takes the file's lock, reads what others have added, and appends a line (one
write, O_APPEND) if the row is new. A resumed run goes on with the same file.

Cost: nothing for good rows.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from data.schema import UserError

USUAL = 0.05  # the share where none is set
ALWAYS_ALLOWED = 3  # so many bad rows stop no run then, however small the data set
SHOWN = 3  # rows that the message names


def allowed_bad(max_bad_fraction: float | None, total: int) -> float:
    """How many bad rows of `total` stop no run. max_bad_fraction: None where none is set."""
    return max(ALWAYS_ALLOWED, USUAL * total) if max_bad_fraction is None else max_bad_fraction * total


def share_told(max_bad_fraction: float | None) -> str:
    return f"{USUAL if max_bad_fraction is None else max_bad_fraction:g}"


class Ledger:
    """Counts distinct bad rows of a data set of `total` rows; picklable, one instance a process.

    `add` raises UserError once there are more than `allowed_bad`.
    """

    def __init__(self, path: str | Path, max_bad_fraction: float | None, total: int) -> None:
        self.path = Path(path)
        self.max_bad_fraction = max_bad_fraction
        self.total = total
        self._seen: dict[tuple[str, int], str] = {}
        self._read_to = 0

    def __len__(self) -> int:
        """Distinct bad rows that this process knows of: its own, and those of others up to its own last one."""
        return len(self._seen)

    def add(self, source: str, row: int, sample_id: str, reason: str) -> None:
        """Note a bad row, once. UserError: too many, or the ledger cannot be written."""
        if (source, row) not in self._seen:
            entry = {"source": source, "row": row, "id": sample_id, "reason": reason}
            try:
                self._append(entry)
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror}); check the run folder and the disk"
                ) from None
        self._check()

    def _append(self, entry: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            whole = self._read_new(file)
            if (entry["source"], entry["row"]) in self._seen:
                return
            line = ("" if whole else "\n") + json.dumps(entry, ensure_ascii=False) + "\n"
            file.write(line.encode(errors="backslashreplace"))  # half a surrogate pair, as JSON writes it: \ud83d
            self._seen[entry["source"], entry["row"]] = entry["reason"]
            self._read_to = os.fstat(file.fileno()).st_size

    def _read_new(self, file: Any) -> bool:
        """Take in the lines since the last reading; False if the last is unfinished (its writer was killed)."""
        file.seek(self._read_to)
        text = file.read()
        whole = not text or text.endswith(b"\n")
        ready = text if whole else text[: text.rfind(b"\n") + 1]
        for line in ready.splitlines():
            try:
                entry = json.loads(line)
                self._seen.setdefault((entry["source"], entry["row"]), entry["reason"])
            except (ValueError, KeyError, TypeError):
                continue  # half a line
        self._read_to += len(ready)
        return whole

    def _check(self) -> None:
        bad = len(self._seen)
        if bad <= allowed_bad(self.max_bad_fraction, self.total):
            return
        reasons = list(self._seen.items())
        shown = "\n".join(f"  {source} row {row}: {reason}" for (source, row), reason in reasons[:SHOWN])
        raise UserError(
            f"{bad} of {self.total} rows cannot be used ({bad / max(1, self.total):.1%}), more than "
            f"data.max_bad_fraction = {share_told(self.max_bad_fraction)}. The first of them:\n{shown}\n"
            f"All are in {self.path}. Mend them (often data.media_dir is wrong), or raise data.max_bad_fraction; "
            "delete the list before starting anew"
        )
