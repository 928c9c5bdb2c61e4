"""MME (Fu et al. 2023): fourteen subtasks of yes/no questions, two about each image.

Folder, as published (github.com/BradyFu/Awesome-Multimodal-Large-Language-Models, MME_Benchmark_release_version): one
folder a subtask, and in it for each image a text file of the same stem with two lines `question<TAB>Yes|No`; in some
subtasks images and texts lie in two folders of their own:

    MME/count/000000006723.jpg    MME/count/000000006723.txt
    MME/posters/images/tt0048028.jpg    MME/posters/questions_answers_YN/tt0048028.txt

Predictions: rows {"subtask", "image_path", "question", "answer", "output": [text]}; without "subtask" the folder of that
name in the image's path tells it.

Scores are MME points: of each subtask acc (right answers, 0 to 100) plus acc+ (images with both answers right, 0 to
100); the score is perception, the sum over ten subtasks (0 to 2000); cognition sums the other four.

    strict     answers as in yes_no.py; an image earns acc+ when both its rows are there and right
    official   yes if the lower-cased text holds it, else no. The published figure reads the posters' rows as scene: the
               scene's own rows are not in it and the posters stand in it twice; `perception_own_scene` is without that

lmms-eval 0.7.3 (task mme) gives the same sums where answers say yes or no plainly. It looks at the first four letters
alone: `Y` and `Eyes` are yes, `Nothing` is no, `The answer is yes` is neither; and it fails where an image has not two
rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.schema import BadSample, Media, Sample, UserError
from eval.benchmarks.base import Earned, Row, total
from eval.benchmarks.questions import ask
from eval.benchmarks.yes_no import YesNo

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
KNOWN = {name.lower(): name for name in PERCEPTION + COGNITION}
IMAGES = (".jpg", ".jpeg", ".png")


class Mme(YesNo):
    name = "mme"
    measure = "perception, points of 2000"
    scale = "points"
    home = (
        "get MME_Benchmark_release_version (github.com/BradyFu/Awesome-Multimodal-Large-Language-Models), unpack it and "
        "name its folder, which holds existence/, count/ and twelve more, as path and as media folder"
    )

    def records(self, path: Path) -> list[Any]:
        if not path.is_dir():
            raise UserError(f"{path}: is a file; {self.home}")
        rows = list(_questions(path))
        if not rows:
            raise UserError(f"{path}: holds no subtask of MME; {self.home}")
        return rows

    def prompt(self, record: Any, index: int) -> Sample:
        subtask, image, line = record
        question, _, answer = line.rpartition("\t")
        if not question.strip():
            raise BadSample(f"{image}: expected `question<TAB>Yes|No`, found {line[:80]!r}")
        name, media = f"{image}#{index}", [Media("image", image, "vision")]
        meta = {"subtask": subtask, "image_path": image}
        return ask(name, question.strip(), answer.strip(), media, index=index, source=self.name, meta=meta)

    # ---- score -------------------------------------------------------------------------------------------------------

    def strict(self, rows: Sequence[Row]) -> list[Earned]:
        return [one for one in self._earned(rows, self.reading) if _name(one.group) in PERCEPTION]

    def official(self, rows: Sequence[Row]) -> list[Earned]:
        own = [one for one in self._earned(rows, self.official_reading) if _name(one.group) in PERCEPTION]
        kept = [one for one in own if _name(one.group) != "scene"]
        posters = [one for one in own if _name(one.group) == "posters"]
        return kept + [one._replace(group=one.group.replace("posters", "scene")) for one in posters]

    def _earned(self, rows: Sequence[Row], reading: Callable[[Row], Any]) -> list[Earned]:
        """acc by row and acc+ by image, 100 points each, grouped as `subtask acc` and `subtask acc+`."""
        earned = []
        images: dict[tuple[str, str], list[bool]] = {}
        for row in rows:
            right, subtask = self.right(row, reading), subtask_of(row)
            earned.append(Earned(row.unit, 100.0 * right, 1.0, f"{subtask} acc"))
            images.setdefault((subtask, row.unit), []).append(right)
        for (subtask, unit), answers in images.items():
            both = len(answers) >= 2 and all(answers)
            earned.append(Earned(unit, 100.0 * both, 1.0, f"{subtask} acc+"))
        return earned

    def details(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self._tables(rows, self.reading)

    def official_details(self, rows: Sequence[Row]) -> dict[str, Any]:
        tables = self._tables(rows, self.official_reading)
        own_scene = tables.pop("perception")
        return {"perception": total(self.official(rows)), "perception_own_scene": own_scene, **tables}

    def _tables(self, rows: Sequence[Row], reading: Callable[[Row], Any]) -> dict[str, Any]:
        groups: dict[str, list[Earned]] = {}
        for one in self._earned(rows, reading):
            groups.setdefault(one.group, []).append(one)
        figures = {group: total(earned) for group, earned in groups.items()}
        present = {_name(group) for group in groups}
        order = [name for name in KNOWN.values() if name in present]
        subtasks = {
            name: {
                "rows": len(groups[f"{name} acc"]),
                "images": len(groups[f"{name} acc+"]),
                "acc": figures[f"{name} acc"],
                "acc+": figures[f"{name} acc+"],
                "score": figures[f"{name} acc"] + figures[f"{name} acc+"],
            }
            for name in [*order, *sorted(present - set(order))]
        }
        return {
            "perception": float(sum(line["score"] for name, line in subtasks.items() if name in PERCEPTION)),
            "cognition": float(sum(line["score"] for name, line in subtasks.items() if name in COGNITION)),
            "subtasks": subtasks,
        }


def subtask_of(row: Row) -> str:
    """The row's subtask by its own word or its image's folder; "unknown" where neither tells."""
    named = row.meta.get("subtask") or row.meta.get("category")
    if isinstance(named, str):
        return KNOWN.get(named.strip().lower(), named.strip() or "unknown")
    folders = re.split(r"[/\\]", row.unit)[:-1]
    return next((KNOWN[folder.lower()] for folder in reversed(folders) if folder.lower() in KNOWN), "unknown")


def _name(group: str) -> str:
    return group.rpartition(" ")[0]


def _questions(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(subtask, image's path in the folder, line) of all subtasks in MME's order."""
    for name in KNOWN.values():
        for text in sorted((folder / name).rglob("*.txt")):
            image = _image_of(text)
            shown = (image or text.with_suffix(".jpg")).relative_to(folder).as_posix()
            for line in text.read_text(encoding="utf-8-sig", errors="replace").split("\n"):
                if line.strip():
                    yield name, shown, line


def _image_of(text: Path) -> Path | None:
    """The image beside a text file, or in the folder images/ beside the text's own."""
    places = [text.parent, text.parent.parent / "images"]
    candidates = (place / (text.stem + ending) for place in places for ending in IMAGES)
    return next((path for path in candidates if path.is_file()), None)
