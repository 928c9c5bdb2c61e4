"""Yes/no questions: sets of one's own, and what POPE, MME and the miniature world's pictures share.

File: jsonl (or a JSON array) of {"id"?, "question", "answer": "yes"|"no"|true|false, "image"|"video"|"audio"|"speech":
path}, paths relative to the media folder.

strict: a prediction (or what of it stands in <answer> tags or a \\boxed{}) says yes or no when its first word does, or when
exactly one of the two stands anywhere in it; otherwise it is unparsed, hence wrong. official (the published MokA scripts for
POPE and MME): yes if the lower-cased text holds `yes` anywhere (`eyes`, too), else no; so nothing is unparsed. Precision,
recall and F1 are those of "yes", over all rows; the yes-ratio is the share of all rows that say yes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from data.schema import Sample
from data.sources.rows import text_of
from eval.benchmarks.base import RightOrWrong, Row, majority, normalise, share
from eval.benchmarks.questions import ask, own_media, record_of
from eval.benchmarks.tags import marked

YES_NO = ("yes", "no")


class YesNo(RightOrWrong):
    name = "yes_no"
    home = "write a jsonl file of your own: see eval/benchmarks/yes_no.py"

    def prompt(self, record: Any, index: int) -> Sample:
        row = record_of(record)
        if isinstance(row.get("answer"), bool):
            row = {**row, "answer": "yes" if row["answer"] else "no"}
        question, answer = text_of(row, "question"), text_of(row, "answer")
        name = str(row.get("id", index))
        return ask(name, question, answer, own_media(row), index=index, source=self.name)

    def parse(self, text: str) -> str | None:
        words = normalise(marked(text)).split()
        said = set(YES_NO) & set(words)
        if words and words[0] in said:
            return words[0]
        return said.pop() if len(said) == 1 else None

    def official_reading(self, row: Row) -> str:
        return "yes" if "yes" in row.prediction.lower() else "no"

    def truth_error(self, row: Row) -> str | None:
        return None if self.truth_of(row) else f"the true answer is neither yes nor no: {row.answer[:60]!r}"

    def truth_of(self, row: Row) -> str | None:
        return self.parse(row.answer)

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.rates(rows, self.reading)

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.rates(rows, self.official_reading)

    def rates(self, rows: Sequence[Row], reading: Callable[[Row], Any]) -> dict[str, Any]:
        pairs = [(self.truth_of(row), reading(row)) for row in rows]
        hits = pairs.count(("yes", "yes"))
        said_yes = sum(answer == "yes" for _, answer in pairs)
        are_yes = sum(truth == "yes" for truth, _ in pairs)
        precision, recall = share(hits, said_yes), share(hits, are_yes)
        return {
            "precision": precision,
            "recall": recall,
            "f1": share(2 * precision * recall, precision + recall),
            "yes_ratio": share(said_yes, len(rows)),
            "baselines": {"majority_answer": share(majority(t for t, _ in pairs if t), len(rows))},
        }
