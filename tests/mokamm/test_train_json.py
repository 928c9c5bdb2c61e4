"""`mokamm/train.py --json`: one JSON object on standard output, and nothing else there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mokamm.test_stopping import ENVIRONMENT, ROOT
from tests.ranks.cases import free_port

TWO_RANKS = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Four steps on text alone, a validation, and a benchmark of one's own."""
    turns = [
        [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} {n}"}] for n in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    (tmp_path / "yes.jsonl").write_text(json.dumps({"id": "1", "question": "Is it?", "answer": "yes"}))
    source = f"[{{source: messages, path: {tmp_path}/rows.jsonl}}]"
    (tmp_path / "run.yaml").write_text(
        f"model: {{llm: {{path: {ROOT}/mokamm/mini/llm}}}}\nadapter: {{method: lora}}\n"
        f"data: {{train: {source}, validation: {source}, max_length: 64}}\n"
        f"training: {{output_dir: {tmp_path}/run, max_steps: 4, per_device_train_batch_size: 2, logging_steps: 1,\n"
        "  report_to: [], use_cpu: true, save_steps: 2, eval_steps: 2}\n"
        f"evaluation: {{benchmarks: [{{benchmark: yes_no, path: {tmp_path}/yes.jsonl}}], max_new_tokens: 4}}\n"
    )
    return tmp_path / "run.yaml"


def test_a_training_on_two_ranks_is_one_object(config: Path) -> None:
    command = [sys.executable, *TWO_RANKS, str(free_port()), str(ROOT / "mokamm/train.py"), str(config), "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told, run = json.loads(done.stdout), config.parent / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {record["kind"]: record for record in records}
    assert (told["run"], told["method"], told["train"]["step"]) == (str(run), "lora", 4)
    assert told["train"]["loss"] == last["train"]["loss"]
    assert told["validation"]["accuracy"] == last["validation"]["accuracy"]
    assert told["trained_parameters"] == {"adapter": 72960}
    assert Path(told["report"]).is_file()
    (benchmark,) = told["benchmarks"]
    metrics = json.loads((run / "predictions" / "yes_no.metrics.json").read_text())
    assert (benchmark["benchmark"], benchmark["rows"], benchmark["score"]) == ("yes_no", 1, metrics["score"])
    assert "run folder" in done.stderr  # what people read


def test_a_mistake_leaves_standard_output_empty(config: Path) -> None:
    command = [sys.executable, str(ROOT / "mokamm/train.py"), str(config), "training.sed=1", "--json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "seed" in done.stderr
