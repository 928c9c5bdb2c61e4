"""lmms-eval's own scores of given answers; run by the Python of an environment with lmms-eval, never imported by tests.

    python tests/eval/lmms_scores.py < rows.json     {benchmark: rows} on standard input, {benchmark: figures} on output

The rows are lmms-eval's docs, each with "said": the model's answer. Its process_results and aggregations score them.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections import defaultdict
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any


def metrics(process: Any, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What process_results gives for each metric, over the rows."""
    found: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        doc = {key: value for key, value in row.items() if key != "said"}
        for name, value in process(doc, [row["said"]]).items():
            found[name].append(value)
    return found


def mme(rows: list[dict[str, Any]]) -> dict[str, float]:
    from lmms_eval.tasks.mme import utils

    found = metrics(utils.mme_process_results, rows)
    return {name: utils.mme_aggregate_results(values) for name, values in found.items()}


def pope(rows: list[dict[str, Any]]) -> dict[str, float]:
    from lmms_eval.tasks.pope import utils

    found = metrics(utils.pope_process_results, rows)
    names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
    return {name: getattr(utils, f"pope_aggregate_{name}")(found[f"pope_{name}"]) for name in names}


def seed_bench(rows: list[dict[str, Any]]) -> dict[str, float]:
    from lmms_eval.tasks.seedbench import utils

    return {"seed_image": utils.seed_aggregation_result(metrics(utils.seed_process_result, rows)["seed_image"])}


def mmbench(rows: list[dict[str, Any]]) -> dict[str, float]:
    from lmms_eval.tasks.mmbench import en_utils

    args = SimpleNamespace(output_path=tempfile.mkdtemp())
    found = metrics(en_utils.mmbench_process_results, rows)
    return {"static": en_utils.mmbench_aggregate_dev_results_static(found["gpt_eval_score"], args)}


def mmau(rows: list[dict[str, Any]]) -> dict[str, float]:
    from lmms_eval.tasks.mmau import utils

    return {"accuracy": utils.mmau_aggregate_results(metrics(utils.mmau_process_results, rows)["accuracy"])}


def air_bench(rows: list[dict[str, Any]]) -> dict[str, float]:
    from lmms_eval.tasks.air_bench import utils

    found = metrics(utils.air_bench_process_results_foundation, rows)
    return {"accuracy": utils.air_bench_aggregate_results_foundation(found["accuracy"])}


def librispeech(rows: list[dict[str, Any]]) -> dict[str, float]:
    from lmms_eval.tasks.librispeech import utils

    return {"wer": utils.librispeech_wer(metrics(utils.librispeech_process_result, rows)["wer"], None)}


def cider(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Its caption tasks hand tokens of the Java tokenizer to this class; here they come tokenised."""
    from pycocoevalcap.cider.cider import Cider

    truths = {index: row["references"] for index, row in enumerate(rows)}
    said = {index: [row["said"]] for index, row in enumerate(rows)}
    return {"CIDEr": float(Cider().compute_score(truths, said)[0])}


SCORERS = {
    "mme": mme, "pope": pope, "seed_bench": seed_bench, "mmbench": mmbench, "mmau": mmau, "air_bench": air_bench,
    "librispeech": librispeech, "cider": cider,
}  # fmt: skip


def figures(name: str, rows: list[dict[str, Any]]) -> Any:
    random.seed(0)
    try:
        return SCORERS[name](rows)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    os.chdir(tempfile.mkdtemp())  # some aggregations write files into the working directory
    with redirect_stdout(sys.stderr):
        results = {case: figures(case.partition(" ")[0], rows) for case, rows in asked.items()}
    print(json.dumps(results))
