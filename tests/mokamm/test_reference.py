"""configs/reference.yaml against the code: every key, whether it is needed, its default, what else it may be, every option.

A comment behind a key begins with [needed] where it has no default, and with (DEFAULT) where the file holds an example.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from data.sources import SOURCES, option_takers
from encoders import ENCODERS
from mokamm import names
from mokamm.config import RunConfig, load_config
from mokamm.config_sections import Part, Section
from mokamm.projectors import PROJECTORS

PATH = Path(__file__).resolve().parents[2] / "configs/reference.yaml"
TEXT = PATH.read_text()
LINES = TEXT.splitlines()
WRITTEN_BY_RUNS = {"versions"}


def sections(node: yaml.Node, section: type[BaseModel], seen: set[type]) -> Iterator[tuple[yaml.Node, type[BaseModel]]]:
    """Each kind of section where it stands first, with its mapping."""
    if section in seen:
        return
    seen.add(section)
    yield node, section
    for key, value in node.value:
        for inner in inner_sections(section.model_fields[key.value].annotation):
            held = value.value[0] if isinstance(value, yaml.SequenceNode) else value
            if key.value == "modalities":  # a mapping of names of one's own
                held = value.value[0][1]
            if isinstance(held, yaml.MappingNode) and not issubclass(inner, Part):
                yield from sections(held, inner, seen)


def inner_sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section | Part):
        return [annotation]
    return [section for part in get_args(annotation) for section in inner_sections(part)]


def literals(annotation: Any) -> set[str]:
    if get_origin(annotation) is Literal:
        return {str(value) for value in get_args(annotation)}
    return {value for part in get_args(annotation) for value in literals(part)}


def keys() -> list[Any]:
    root = yaml.compose(TEXT)
    found = []
    for node, section in sections(root, RunConfig, set()):
        settled = {name for name, field in section.model_fields.items() if field.exclude}  # have one value
        assert {key.value for key, _ in node.value} == set(section.model_fields) - WRITTEN_BY_RUNS - settled, section
        values = yaml.safe_load(yaml.serialize(node))
        for key, _ in node.value:
            field, line = section.model_fields[key.value], told(key.start_mark.line)
            found.append(pytest.param(field, values[key.value], line, id=f"{section.__name__}.{key.value}"))
    return found


def told(number: int) -> str:
    """A line, with the comment that goes on below it."""
    below = itertools.takewhile(lambda line: line.lstrip().startswith("#"), LINES[number + 1 :])
    return " ".join([LINES[number], *below])


@pytest.mark.parametrize(("field", "value", "line"), keys())
def test_a_key(field: FieldInfo, value: Any, line: str) -> None:
    comment = line.partition(" # ")[2]
    if not isinstance(field.annotation, type) or not issubclass(field.annotation, Section):  # its own keys say it
        assert field.is_required() == comment.startswith("[needed]")
    assert all(re.search(rf"\b{other}\b", line) for other in literals(field.annotation))
    if not field.is_required() and (value is None or not inner_sections(field.annotation)):
        example = re.match(r"\((\S+)\)", comment)
        assert (yaml.safe_load(example[1]) if example else value) == field.default
    for section in inner_sections(field.annotation) if value is None else []:  # the comment shows its keys
        shown = yaml.safe_load(comment[comment.index("{") : comment.index("}") + 1])
        assert shown.keys() == section.model_fields.keys()
        assert all(shown[name] == own.default for name, own in section.model_fields.items() if not own.is_required())


def test_it_is_a_configuration_of_defaults_and_names_all_parts() -> None:
    config = load_config(PATH)
    assert config.data.limits == type(config.data.limits)()
    (methods,) = [line for line in LINES if line.startswith("  method: ")]
    assert all(re.search(rf"\b{method}\b", methods) for method in names.METHODS)


def encoder(name: str) -> type:
    module, _, cls = ENCODERS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


PARTS: list[tuple[str, list[Callable[..., Any]]]] = [
    *((name, [encoder(name)]) for name in ENCODERS),
    *((name, [cls]) for name, cls in PROJECTORS.items()),
    *((name, list(option_takers(name))) for name in SOURCES),
]


@pytest.mark.parametrize(("name", "takers"), PARTS, ids=[name for name, _ in PARTS])
def test_the_options_of_a_part(name: str, takers: list[Callable[..., Any]]) -> None:
    (line,) = [line for line in LINES if re.match(rf"#     {name} ", line)]
    said = re.sub(r" \((?!\.)[^()]*\)", "", line.split(maxsplit=2)[2])  # without remarks
    options = {
        parameter.name: parameter.default
        for taker in takers
        for parameter in inspect.signature(taker).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "strip_prefix"
    }
    shown = {k: v if isinstance(v, str) else json.dumps(v) for k, v in options.items()}
    assert sorted(f"{key}: {value}" for key, value in shown.items()) == sorted(re.split(r", (?=\w+: )", said))
