"""A benchmark of eval/benchmarks/ as a task of lmms-eval: the same files, prompts, parser and scores.

    files --Benchmark.load--> rows --messages_of--> lmms-eval --> text --to_json--> records --predictions.py--> score

A task is a YAML file (see tasks/ave.yaml); a file of one's own includes one of these and says where the data lie:

    include: /path/to/mokamm/eval/lmms/tasks/ave.yaml
    task: ave
    dataset_kwargs: {path: /data/AVE/testSet.txt, media_dir: /data/AVE}

path and media_dir may hold $VARIABLES; `options` of dataset_kwargs are the source's (video_dir, audio_dir). Metrics:
the strict and the official score and the share of rows that could be parsed. With --log_samples each line holds, under each
metric's name, a row that eval/score.py reads. Any chat model of lmms-eval can be asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask

from data.schema import UserError
from eval.benchmarks import find_benchmark
from eval.benchmarks.fields import take_apart
from eval.lmms.messages import messages_of, user_turn
from eval.predictions import collect

METRICS = ("strict", "official", "parsed")
UNREADABLE = "This row cannot be read."


class BenchmarkTask(ConfigurableMessagesTask):
    def __init__(self, config: dict[str, Any]) -> None:
        known = {key: value for key, value in config.items() if key not in ("class", "benchmark")}
        self.benchmark = find_benchmark(config["benchmark"])
        super().__init__(config={"test_split": "test", "output_type": "generate_until", **known})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Nothing is fetched: the benchmark's files are read where they lie. UserError where they are not."""
        given = dataset_kwargs or {}
        path, media_dir = (Path(self._place(given, key)) for key in ("path", "media_dir"))
        self.media_dir = media_dir
        self.rows = self.benchmark.load(path, options=given.get("options"), media_dir=media_dir)
        docs = [
            {"index": row.index, "id": row.id, "question": _question(row), "answer": row.answer} for row in self.rows
        ]
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_list(docs)})
        self.dataset_no_image = self.dataset

    def _place(self, given: dict[str, Any], key: str) -> str:
        place = os.path.expandvars(str(given.get(key) or ""))
        if not place or "$" in place:
            raise UserError(
                f"task of {self.benchmark.name}: dataset_kwargs.{key} is {given.get(key)!r}, which names no place; set "
                f"the variable in it, or write a YAML file of your own (eval/lmms/task.py); {self.benchmark.home}"
            )
        return place

    # ---- ask -----------------------------------------------------------------------------------------------------

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return doc["question"]

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return doc["answer"]

    def doc_to_visual(self, doc: dict[str, Any]) -> list[str]:
        sample = self.rows[doc["index"]].sample
        return [str(self.media_dir / media.path) for media in sample.media] if sample else []

    def doc_to_messages(self, doc: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        sample = self.rows[doc["index"]].sample
        return messages_of(sample.prompt, self.media_dir) if sample else user_turn([], UNREADABLE)

    # ---- score ---------------------------------------------------------------------------------------------------

    def process_results(self, doc: dict[str, Any], results: Sequence[str], full_docs: Any = None) -> dict[str, Any]:
        row = replace(self.rows[doc["index"]], prediction=str(results[0] or ""))
        return dict.fromkeys(METRICS, self.benchmark.to_json(row))

    def aggregation(self) -> dict[str, Callable[[list[dict[str, Any]]], float]]:
        return {metric: partial(figure, self.benchmark.name, metric) for metric in METRICS}

    def higher_is_better(self) -> dict[str, bool]:
        return {metric: metric == "parsed" or not self.benchmark.lower_is_better for metric in METRICS}


def figure(name: str, metric: str, records: list[dict[str, Any]]) -> float:
    """One of METRICS over the records of the rows that were asked, as eval/score.py has it."""
    benchmark = find_benchmark(name)
    collected = collect(benchmark, [take_apart(record) for record in records])
    score = benchmark.score(collected.rows, collected.filed)
    return score["parsed"] / max(1, score["rows"]) if metric == "parsed" else score["rules"][metric]["score"]


def _question(row: Any) -> str:
    return row.sample.prompt[-1].text if row.sample else UNREADABLE
