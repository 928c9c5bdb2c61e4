"""A configuration's file as read: keys with their lines, overrides laid over them, and mistakes told for people.

Nothing here knows what a configuration means; mokamm/config_sections.py does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from data.schema import UserError, listed, nearest


class ConfigError(UserError):
    """The configuration cannot be used; the message lists all of its mistakes."""


# ---- YAML with lines -------------------------------------------------------------------------------------------------

Path_ = tuple[Any, ...]
Lines = dict[Path_, "int | str"]  # of a key: its line, with its file where that is one that is extended, or OVERRIDE
OVERRIDE = "override"
TIMESTAMP = "tag:yaml.org,2002:timestamp"


class Loader(yaml.SafeLoader):
    """YAML in which a date is text: a run or a revision may be called so, and a key for dates reads it by itself."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != TIMESTAMP]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Lines]:
    """A file's mapping and where each key stands.

    `extends: other.yaml` (or a list, a later one over an earlier one; paths from the file's own folder) lays the file
    over others: mappings are merged key by key, anything else replaces what it covers.
    """
    if path.resolve() in seen:
        raise ConfigError(f"extends: {path} extends itself, through {' > '.join(p.name for p in seen)}")
    tree, own = _read_one(path)
    extended = tree.pop("extends", [])
    names = [extended] if isinstance(extended, str) else extended
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends: expected the name of a file, or a list of them; found {extended!r}")
    merged: dict[str, Any] = {}
    lines: Lines = {}
    for name in names:
        below, places = read_yaml(path.parent / name, (*seen, path.resolve()))
        _lay_over(merged, lines, below, places)
    here: Lines = {at: f"{line} of {path}" if seen else line for at, line in own.items()}
    _lay_over(merged, lines, tree, here)
    return merged, lines


def _lay_over(tree: dict[str, Any], lines: Lines, over: dict[str, Any], places: Lines, at: Path_ = ()) -> None:
    """Merge `over` into `tree`, in place, and the lines of its keys into `lines`."""
    for key, value in over.items():
        here = (*at, key)
        if here in places:
            lines[here] = places[here]
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _lay_over(tree[key], lines, value, places, here)
            continue
        _forget_below(lines, here)
        lines.update({place: line for place, line in places.items() if place[: len(here)] == here})
        tree[key] = value


def _forget_below(lines: Lines, at: Path_) -> None:
    for old in [place for place in lines if place[: len(at)] == at and place != at]:
        del lines[old]


def _read_one(path: Path) -> tuple[dict[str, Any], dict[Path_, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = nearest_file(path, "*.yaml")
        raise ConfigError(f"no such configuration file: {path} (working directory {Path.cwd()}){hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        tree, node = yaml.load(text, Loader), yaml.compose(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} must hold a mapping with the keys model, data, training; found {type(tree).__name__}"
        )
    lines: dict[Path_, int] = {}
    twice: list[str] = []
    _walk(node, (), lines, twice)
    if twice:
        raise ConfigError(listed(f"{path} sets keys twice:", twice))
    return tree, lines


def nearest_file(path: Path, pattern: str) -> str:
    """The end of a message about a missing file: those of that pattern in its folder, where there are any."""
    there = sorted(p.as_posix() for p in path.parent.glob(pattern)) if path.parent.is_dir() else []
    return nearest(path.as_posix(), there) if there else ""


def _walk(node: Any, at: Path_, lines: dict[Path_, int], twice: list[str]) -> None:
    """Record the 1-based line of every key and list entry below `node`, and keys that stand twice in one mapping."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            here = (*at, key.value)
            if key.value in seen:
                twice.append(f"{_dotted(here)} (line {key.start_mark.line + 1})")
            seen.add(key.value)
            lines[here] = key.start_mark.line + 1
            _walk(value, here, lines, twice)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*at, i)] = value.start_mark.line + 1
            _walk(value, (*at, i), lines, twice)


# ---- overrides -------------------------------------------------------------------------------------------------------


def apply_overrides(tree: dict[str, Any], lines: Lines, overrides: list[str]) -> list[str]:
    """Lay `a.b.c=value` over the tree (value is YAML, list entries by number), in place; returns the mistakes."""
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f"override '{override}': expected dotted.key=value, as in training.max_steps=20")
            continue
        try:
            value = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            problems.append(f"override '{override}': the value is not valid YAML: {error}")
            continue
        at = _set(tree, key.split("."), value)
        if isinstance(at, str):
            problems.append(f"override '{override}': {at}")
            continue
        _forget_below(lines, at)
        lines[at] = OVERRIDE
    return problems


def _set(tree: Any, parts: list[str], value: Any) -> Path_ | str:
    """The place that was set, or what is wrong with it."""
    at: Path_ = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(tree, list):
            if not part.isdigit() or int(part) >= len(tree):
                known = f"the entries 0 to {len(tree) - 1}" if tree else "no entries"
                return f"{'.'.join(parts[:depth])} has {known}; found '{part}'"
            index: Any = int(part)
        elif isinstance(tree, dict):
            index = part
        else:
            return f"{'.'.join(parts[:depth])} is a value and has no key '{part}'"
        at = (*at, index)
        if last:
            tree[index] = value
        else:
            if isinstance(tree, dict) and tree.get(index) is None:
                tree[index] = {}
            tree = tree[index]
    return at


# ---- messages --------------------------------------------------------------------------------------------------------


def explain(model: type[BaseModel], error: ValidationError, tree: dict[str, Any], lines: Lines) -> list[str]:
    """pydantic's errors as lines for people, in the order of the file; branches of a union are joined."""
    mistakes: dict[Path_, list[str]] = {}
    found: dict[Path_, str] = {}
    for item in error.errors(include_url=False):
        at = _in_tree(item["loc"], tree)
        match item["type"]:
            case "extra_forbidden":
                known = _known_keys(model, at[:-1])
                message = f"unknown key '{at[-1]}'{nearest(str(at[-1]), known)}"
            case "missing":
                at, message = item["loc"], "this key is missing"
            case "value_error":
                message = str(item["ctx"]["error"])
            case _:
                message = f"{item['msg'][0].lower()}{item['msg'][1:]}"
                found[at] = f"; found {_short(item['input'])}"
        mistakes.setdefault(tuple(at), []).append(message)
    return [
        f"{_dotted(at)}{_line(at, lines)}: {' or '.join(messages)}{found.get(at, '')}"
        for at, messages in mistakes.items()
    ]


def _in_tree(location: Path_, tree: Any) -> Path_:
    """The part of a pydantic location that exists in the file (pydantic adds the branch of a union)."""
    at: list[Any] = []
    for part in location:
        inside = (isinstance(tree, dict) and part in tree) or (
            isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        )
        if not inside:
            break
        tree = tree[part]
        at.append(part)
    return tuple(at)


def _known_keys(model: Any, at: Path_) -> list[str]:
    """The keys of the section that a location leads to."""
    for part in at:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = _section(field.annotation) if field else model
    return list(model.model_fields)


def _section(annotation: Any) -> Any:
    """The section inside `X | None`, `list[X]` and `dict[str, X]`."""
    if get_origin(annotation) is None:
        return annotation
    inner = [_section(argument) for argument in get_args(annotation)]
    return next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), annotation)


def _line(at: Path_, lines: Lines) -> str:
    for end in range(len(at), 0, -1):
        if (line := lines.get(at[:end])) is not None:
            return f" ({line})" if line == OVERRIDE else f" (line {line})"
    return ""


def _dotted(at: Path_) -> str:
    return ".".join(str(part) for part in at) or "the configuration"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
