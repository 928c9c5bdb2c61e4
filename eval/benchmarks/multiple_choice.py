"""Multiple-choice questions: sets of one's own, and what MMBench, SEED-Bench, MMAU and AIR-Bench share.

File: jsonl (or a JSON array) of {"id"?, "question", "choices": [texts], "answer": letter, text or number from 0,
"category"?, "image"|"video"|"audio"|"speech": path}, paths relative to the media folder.

The model sees the question and the options A., B., ... line by line, and is told to answer with the letter. Accuracy is
over all rows; how a letter is read under either rule: see choices.py. A letter that no option bears is unparsed. Rows
with a category get a table of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from data.schema import BadSample, Media, Sample
from data.sources.rows import text_of
from eval.benchmarks.base import RightOrWrong, Row, majority, share
from eval.benchmarks.choices import LETTERS, choose, listed, official_choice, options_in, true_letter
from eval.benchmarks.fields import Fields
from eval.benchmarks.questions import ask, own_media, record_of

INSTRUCTION = "Answer with the option's letter."


class MultipleChoice(RightOrWrong):
    """categories: keys of `meta` that get a table each. texts_are_true: the publishers' true answers are texts."""

    name = "multiple_choice"
    home = "write a jsonl file of your own: see eval/benchmarks/multiple_choice.py"
    categories: ClassVar[tuple[str, ...]] = ("category",)
    texts_are_true: ClassVar[bool] = False

    # ---- load and prompt ---------------------------------------------------------------------------------------------

    def prompt(self, record: Any, index: int) -> Sample:
        row = record_of(record)
        choices = row.get("choices") or row.get("options")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise BadSample(f"'choices' must be a list of texts, found {choices!r}")
        answer = numbered(row.get("answer"), choices) or row.get("answer")
        meta = {key: row[key] for key in self.categories if key in row}
        name = str(row.get("id", index))
        return self.asked(name, text_of(row, "question"), choices, str(answer or ""), own_media(row), index, meta)

    def asked(
        self,
        name: str,
        question: str,
        choices: Sequence[str],
        answer: str,
        media: Sequence[Media],
        index: int,
        meta: dict[str, Any],
    ) -> Sample:
        """The sample of a question with its options; `answer`: a letter or an option's text."""
        if len(choices) > len(LETTERS):
            raise BadSample(f"{len(choices)} options; there are letters for {len(LETTERS)}")
        letter = true_letter(answer, choices, self.texts_are_true)
        if letter is None or letter not in LETTERS[: len(choices)]:
            raise BadSample(f"the true answer {answer[:60]!r} is none of the {len(choices)} options")
        text = f"{question}\n{listed(choices)}"
        meta = {**meta, "choices": list(choices), "asked": question}
        return ask(name, text, letter, media, index=index, source=self.name, instruction=INSTRUCTION, meta=meta)

    def from_record(self, fields: Fields, index: int) -> Row:
        """A published true answer that is a text becomes its letter, as it stands in rows of eval/run.py."""
        row = super().from_record(fields, index)
        if self.texts_are_true and row.published:
            row.answer = true_letter(row.answer, self.choices_of(row), text_first=True) or row.answer
        return row

    def truth(self, fields: Fields) -> str:
        """In this format, unlike those of publishers and of eval/run.py, a number is that of an option."""
        if type(self) is not MultipleChoice:
            return fields.truth
        choices = self.choices_of(Row("", 0, meta=fields.meta))
        return numbered(fields.meta.get("answer"), choices) or fields.truth

    # ---- parse -------------------------------------------------------------------------------------------------------

    def parse(self, text: str) -> str | None:
        return choose(text)

    def reading(self, row: Row) -> str | None:
        return choose(row.said, self.choices_of(row)) if row.error is None else None

    def official_reading(self, row: Row) -> str | None:
        return official_choice(row.prediction)

    def choices_of(self, row: Row) -> list[str]:
        """The options' texts, where the row has them or its question lists them."""
        listed_choices = row.meta.get("choices") or row.meta.get("options")
        if isinstance(listed_choices, list):
            return [str(choice) for choice in listed_choices]
        question = row.meta.get("question")
        return options_in(question) if isinstance(question, str) else []

    def truth_of(self, row: Row) -> str | None:
        return true_letter(row.answer, self.choices_of(row))

    def same_truth(self, row: Row, truth: Row) -> bool:
        own = self.truth_of(row) or true_letter(row.answer, self.choices_of(truth))
        return own == self.truth_of(truth)

    def truth_error(self, row: Row) -> str | None:
        return None if self.truth_of(row) else f"the true answer is no option's letter: {row.answer[:60]!r}"

    # ---- score -------------------------------------------------------------------------------------------------------

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        truths = [truth for truth in map(self.truth_of, rows) if truth]
        baselines = {"majority_letter": share(majority(truths), len(rows))}
        return {**self.tables(rows, self.reading), "baselines": baselines}

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self.tables(rows, self.official_reading)

    def tables(self, rows: Sequence[Row], reading: Callable[[Row], Any]) -> dict[str, Any]:
        """For each key of `categories` that rows have: accuracy by its values."""
        tables = {}
        for key in self.categories:
            members: dict[str, list[bool]] = defaultdict(list)
            for row in rows:
                if isinstance(row.meta.get(key), str | int):
                    members[str(row.meta[key])].append(self.right(row, reading))
            if members:
                tables[key] = {
                    name: {"rows": len(right), "accuracy": share(sum(right), len(right))}
                    for name, right in sorted(members.items())
                }
        return tables


def lettered(row: dict[str, Any]) -> list[str]:
    """The options that a row has under choice_a to choice_d, as publishers write them."""
    return [str(row[key]) for key in ("choice_a", "choice_b", "choice_c", "choice_d") if row.get(key) is not None]


def numbered(answer: Any, choices: Sequence[str]) -> str | None:
    """The letter of an option that is named by its number from 0; None where the answer is no such number."""
    known = LETTERS[: len(choices)]
    return known[answer] if type(answer) is int and 0 <= answer < len(known) else None
