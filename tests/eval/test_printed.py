"""What eval/run.py prints and reports of names that came out of an annotation file, and of several entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import eval.run
from eval.printing import print_metrics
from mokamm.report import write_report

HOSTILE = "<b>[/red]\ud800"


def metrics(name: str) -> dict[str, Any]:
    rule = {"score": 0.5, "interval": [0.25, 0.75], "rows": 4, "parsed": 4, "unparsed": 0}
    tables = {"types": {HOSTILE: {"rows": 4, "accuracy": 0.5}}}
    counts = {"rows": 4, "parsed": 4, "unparsed": 0, "bad": 0, "control": None, "metrics": tables}
    whole = {"name": name, "benchmark": "pope", "measure": "accuracy", "scale": "share", "score": 0.5}
    return whole | {"interval": [0.25, 0.75], "rules": {"strict": rule, "official": rule}} | counts


@pytest.mark.parametrize(
    ("word", "names"), [("pope", ["pope", "pope_2"]), ("pope", ["mine"]), ("pope", ["pope"]), ("all", ["pope"])]
)
def test_json_holds_every_entry_that_was_meant(word, names, monkeypatch, capfd):
    found = {name: metrics(name) for name in names}
    monkeypatch.setattr(eval.run, "run", lambda args, report: found)
    assert eval.run.main([word, "RUN", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    several = word == "all" or len(names) > 1
    assert told == ({"run": "RUN", "control": None, "benchmarks": found} if several else found[names[0]])


def test_shares_are_told_from_points(capfd) -> None:
    points = {"measure": "perception, points of 2000", "scale": "points", "score": 1025.9, "interval": [990.0, 1060.5]}
    print_metrics({"pope": metrics("pope"), "mme": metrics("mme") | points | {"metrics": {}}}, "RUN")
    lines = capfd.readouterr().out.split("\n")
    (share,) = (line for line in lines if "pope " in line and "accuracy" in line)
    (mme,) = (line for line in lines if "mme" in line)
    assert "50.0" in share
    assert "(%)" in share
    assert "1025.9" in mme
    assert "%" not in mme
    assert not any("score %" in line for line in lines)


def test_half_a_letter_and_markup_in_a_name_are_shown(tmp_path: Path, capfd) -> None:
    print_metrics({"pope": metrics("pope")}, "RUN")
    assert "<b>[/red]\\ud800" in capfd.readouterr().out
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "pope.metrics.json").write_text(json.dumps(metrics("pope")))
    assert "\\ud800" in write_report(tmp_path).read_text()
