"""The console command: a thin front door, checked as the user runs it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mokamm import cli

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mokamm.cli", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def test_usage_names_every_command(capsys):
    for arguments, code in (([], 2), (["--help"], 0), (["data"], 2), (["data", "--help"], 0)):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == code
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["infre"])
    assert end.value.code == 2
    assert "unknown command 'infre'; did you mean 'infer'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["data", "chek", "x.yaml"])
    assert "unknown command 'data chek'; did you mean 'data check'?" in capsys.readouterr().err


def test_commands_are_programs_of_this_repository():
    for module, _ in cli.COMMANDS.values():
        path = ROOT / module.replace(".", "/")
        source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert any("__main__" in ast.unparse(node) for node in ast.parse(source.read_text()).body) or path.is_dir()


def test_a_command_runs_its_program_with_its_arguments():
    done = call("infer", "nowhere", "hello")
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere is no finished run")
    done = call("infer", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mokamm infer") or "--speech" in done.stdout


def test_a_reader_that_leaves_is_no_error():
    """As `mokamm ... | head` does."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mokamm.cli", "data", "make", "--help"],
        cwd=ROOT, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_ctrl_c_has_no_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "x.yaml"])
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "\nstopped\n")
