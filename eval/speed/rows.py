"""What a large annotation file costs the main process:  python eval/speed/rows.py [--rows 1000000] [--json]

Writes a file of that many conversations in each form (messages as jsonl; LLaVA's JSON array), then, in a process of its
own for each: opens it; makes the training's data set of it, draws an epoch's order and reads 1000 rows in that order;
and reads one row through a pickle, as a spawned worker gets it.

    opened_mb    the most resident memory of the process once the file is open: Python, numpy and the rows
    growth_mb    at the end, above the same process over a file of ten rows (both hold torch by then, some 500 MB)
    open_s       CPU seconds to index the file, in which every row is parsed once to count its answers
    rows_s       rows read a second, in random order

The result is also written to eval/speed/results/rows.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from eval.speed.reporting import RESULTS, keep, surroundings

ROOT = Path(__file__).resolve().parents[2]
FORMS = ("messages", "llava")
QUESTION = "Which instrument is heard first, and where in the picture is it played, row {}?"

PROBE = """
import json, pickle, re, sys, time
from data.sources import open_source
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # no parent's in it
source, path, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
began = time.process_time()
found = open_source(source, path)
opened = time.process_time() - began
opened_mb = peak()
assert len(found) == rows, len(found)
from data.dataset import MultimodalDataset
from data.ledger import Ledger
from data.order import epoch_order
dataset = MultimodalDataset([(found, 1.0, "rows")], lambda sample: sample, Ledger("nowhere.jsonl", 0.0, rows))
order = epoch_order(rows, 0, 0)[:1000]
began = time.process_time()
for index in order:
    assert dataset[int(index)].messages[-1].text == f"The flute, {index}."
read = (time.process_time() - began) / len(order)
again = pickle.loads(pickle.dumps(found))
assert again[rows - 1].messages == found[rows - 1].messages
print(json.dumps({"opened_mb": opened_mb, "peak_mb": peak(), "open_s": opened, "rows_s": 1 / read}))
"""


def write(form: str, path: Path, rows: int) -> None:
    with path.open("w") as file:
        if form == "messages":
            file.writelines(json.dumps(row) + "\n" for row in _messages(rows))
        else:
            file.write("[\n")
            file.writelines((",\n" if k else "") + json.dumps(row) for k, row in enumerate(_llava(rows)))
            file.write("\n]\n")


def _messages(rows: int) -> Iterator[dict]:
    for k in range(rows):
        content = [
            {"type": "video", "path": f"videos/{k:08}.mp4"},
            {"type": "text", "text": QUESTION.format(k)},
        ]
        answer = {"role": "assistant", "content": f"The flute, {k}."}
        yield {"id": f"{k:08}", "messages": [{"role": "user", "content": content}, answer]}


def _llava(rows: int) -> Iterator[dict]:
    for k in range(rows):
        talk = [
            {"from": "human", "value": "<video>\n" + QUESTION.format(k)},
            {"from": "gpt", "value": f"The flute, {k}."},
        ]
        yield {"id": f"{k:08}", "video": f"videos/{k:08}.mp4", "conversations": talk}


def measure(form: str, rows: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        found = []
        for count in (10, rows):
            path = Path(place) / f"{count}.json"
            write(form, path, count)
            command = [sys.executable, "-c", PROBE, form, str(path), str(count)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            found.append(json.loads(done.stdout))
        small, large = found
        return {
            "rows": rows,
            "file_mb": round(path.stat().st_size / 2**20, 1),
            "opened_mb": round(large["opened_mb"], 1),
            "growth_mb": round(large["peak_mb"] - small["peak_mb"], 1),
            "open_s": round(large["open_s"], 2),
            "rows_s": round(large["rows_s"]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = {**surroundings("rows.py", args), "forms": {form: measure(form, args.rows) for form in FORMS}}
    if keep(result, RESULTS / "rows.json", args.json):
        return
    for form, row in result["forms"].items():  # type: ignore[attr-defined]
        print(
            f"{form:>9}: {row['rows']:,} rows, {row['file_mb']:.0f} MB; open at {row['opened_mb']:.0f} MB, a training's "
            f"process grows by {row['growth_mb']:.0f} MB; opened in {row['open_s']:.1f} s, {row['rows_s']:,} rows/s"
        )


if __name__ == "__main__":
    main()
