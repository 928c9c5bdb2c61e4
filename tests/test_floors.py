"""The building's statics: which floor may import which, names that shadow nothing, no file tied to a machine.

Imports are read with `ast`, wherever in a file they stand: inside functions, under TYPE_CHECKING, and as literal
arguments of `import_module` and `__import__`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "data": {"data"},
    "encoders": {"encoders"},
    "mokamm": {"mokamm", "encoders", "data"},
    "eval": {"eval", "mokamm", "encoders", "data"},
}
PLUGIN = ("mokamm.adapters", "mokamm.routing")  # usable without the rest
PLUGIN_MAY = {"torch", "peft"}
SCRIPT_FOLDERS = ("mokamm", "eval", "eval/speed")  # first on sys.path when one of their scripts runs
HOSTS = (
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("download", "pytorch", "org"),
    ("conda", "anaconda", "org"),
    ("registry", "npmjs", "org"),
    ("proxy", "golang", "org"),
)


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names of all that a module's source imports; `from a import b` gives both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + is_package
                base = ".".join([*parts[:keep], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(encoding="utf-8"), name_of(path), path.name == "__init__.py")


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def repository_files() -> list[Path]:
    """Tracked files and those about to be; the whole tree where this is no git checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        hidden = {".venv", ".git", "__pycache__"}
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        listed = [path.as_posix() for path in found if not hidden & set(path.parts) and path.name != "uv.lock"]
    return sorted(ROOT / name for name in set(listed) if name and (ROOT / name).is_file())


def project() -> dict[str, Any]:
    return cast(dict[str, Any], tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def test_the_import_reader_sees_every_kind_of_import() -> None:
    source = (
        "import a.b as c\n"
        "from d import e\n"
        "from . import f\n"
        "from ..g import h\n"
        "def i():\n    import j\n    from k.l import m\n"
        "import importlib\nimportlib.import_module('n.o')\n__import__('p')\n"
    )
    names = {"a.b", "d", "d.e", "x.y.f", "x.g.h", "j", "k.l.m", "n.o", "p"}
    assert names <= imports(source, "x.y.z")
    assert {"x.y.z.f", "x.y.g.h"} <= imports(source, "x.y.z", is_package=True)


@pytest.mark.parametrize("folder", [*FLOORS, "configs", "tests"])
def test_every_floor_exists(folder: str) -> None:
    assert (ROOT / folder).is_dir()


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor: str) -> None:
    ours = {*FLOORS, "tests"}
    for path in modules(floor):
        tops = {name.split(".")[0] for name in imports_of(path)}
        assert not (tops & ours) - FLOORS[floor], f"{path.relative_to(ROOT)} imports a floor above or beside its own"


def test_the_adapters_need_torch_and_peft_only() -> None:
    files = [path for path in modules("mokamm") if within(name_of(path), PLUGIN)]
    assert files, "mokamm/adapters and mokamm/routing.py are missing"
    for path in files:
        for name in imports_of(path):
            top = name.split(".")[0]
            if top == "mokamm":
                assert name == "mokamm" or within(name, PLUGIN), f"{path.relative_to(ROOT)} imports {name}"
            else:
                assert top in PLUGIN_MAY | sys.stdlib_module_names, f"{path.relative_to(ROOT)} imports {name}"


def test_the_package_itself_imports_nothing() -> None:
    assert imports_of(ROOT / "mokamm" / "__init__.py") == set()


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS)
def test_no_module_shadows_another(folder: str) -> None:
    """A script's folder comes first on sys.path: its neighbours would be imported in place of their namesakes."""
    if folder == "eval/speed" and not (ROOT / folder).exists():
        pytest.skip("eval/speed comes with the speed measurements")
    names = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / folder).iterdir()}
    names = {name for name in names if name.isidentifier() and not name.startswith("__")}
    installed = {name for name in importlib.metadata.packages_distributions() if name not in FLOORS}
    assert not names & sys.stdlib_module_names
    assert not names & installed


def test_configs_are_data() -> None:
    for path in (ROOT / "configs").rglob("*"):
        if path.is_file():
            assert path.suffix in (".yaml", ".json", ".md"), f"{path.relative_to(ROOT)} is no configuration"
            assert not path.stat().st_mode & 0o111, f"{path.relative_to(ROOT)} is executable"
            assert "!!python" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["torchvision", "torchaudio"])
def test_a_companion_of_torch_is_bound_to_one_torch(name: str) -> None:
    """By its own wheel or by this project: pip takes the newest of a range, and a library built for another torch fails
    when it is imported."""
    own = map(Requirement, importlib.metadata.requires(name) or [])
    ours = map(Requirement, project()["dependencies"])
    bounds = [r for r in own if r.name == "torch"] + [r for r in ours if r.name == name]
    exact = [s for r in bounds for s in r.specifier if s.operator == "==" and not s.version.endswith("*")]
    assert exact, [str(requirement) for requirement in bounds]


def test_a_wheel_carries_every_licence_text() -> None:
    texts = {path.name for path in ROOT.iterdir() if path.name.startswith(("LICENSE", "NOTICE"))}
    assert texts == set(project()["license-files"])


def test_gitignore_leaves_the_data_package_alone() -> None:
    patterns = (ROOT / ".gitignore").read_text().splitlines()
    assert not [pattern for pattern in patterns if pattern.strip().strip("/*") == "data"]


def test_no_file_is_tied_to_a_machine_or_a_registry() -> None:
    """Neither a path of somebody's machine nor a host that packages come from. (Written so as not to find itself.)"""
    folders = "|".join(("root", "home", "work", "Users"))
    path_pattern = re.compile(rf"(?<![\w.$}}-])/(?:{folders})/")
    host_pattern = re.compile("|".join(re.escape(".".join(host)) for host in HOSTS))
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
            found = path_pattern.search(line) or host_pattern.search(line)
            assert not found, f"{path.relative_to(ROOT)}:{number} names {found.group(0)}"
