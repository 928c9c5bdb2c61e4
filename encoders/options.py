"""The options of registered parts, checked against the signatures of their classes.

A part's options are its class's keyword-only arguments. Their annotations are what they accept: `int`, `str | None`, or
with a range `Annotated[int, Field(ge=1)]`, read by pydantic without any conversion: "3" is no number and true none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from encoders.errors import nearest


def option_problems(made_by: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """What is wrong with `options` as keyword arguments of a class or function, one message for each; empty: nothing."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    function = made_by.__init__ if isinstance(made_by, type) else made_by  # type: ignore[misc]
    annotations = get_type_hints(function, include_extras=True)
    known = [p.name for p in inspect.signature(made_by).parameters.values() if p.kind is p.KEYWORD_ONLY]
    problems = []
    for option, value in options.items():
        if option not in known:
            hint = nearest(option, known) if known else "; it has none"
            problems.append(f"has no option '{option}'{hint}")
            continue
        try:
            TypeAdapter(annotations[option], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            reasons = dict.fromkeys(str(part["msg"]).replace("Input should", "should", 1) for part in error.errors())
            problems.append(f"option '{option}' {', or '.join(reasons)}; found {value!r}")
    return problems
