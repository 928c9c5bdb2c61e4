"""The options of registered parts, checked against the signatures of their classes (data readers': of their functions).

A part's options are its keyword-only arguments. Their annotations are what they accept: `int`, `str | None`, or
with a range `Annotated[int, Field(ge=1)]`, read by pydantic without any conversion: "3" is no number and true none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from encoders.errors import nearest


def option_problems(options: Mapping[str, Any], *takers: Callable[..., Any]) -> list[str]:
    """What is wrong with `options` as keyword arguments of classes or functions, one message for each; empty: nothing.

    Of several that know an option, the last one's annotation counts.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    known: dict[str, Any] = {}
    for taker in takers:
        annotations = get_type_hints(taker.__init__ if isinstance(taker, type) else taker, include_extras=True)  # type: ignore[misc]
        names = [p.name for p in inspect.signature(taker).parameters.values() if p.kind is p.KEYWORD_ONLY]
        known |= {name: annotations[name] for name in names}
    problems = []
    for option, value in options.items():
        if option not in known:
            hint = nearest(option, known) if known else "; it has none"
            problems.append(f"has no option '{option}'{hint}")
            continue
        try:
            TypeAdapter(known[option], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            reasons = dict.fromkeys(str(part["msg"]).replace("Input should", "should", 1) for part in error.errors())
            problems.append(f"option '{option}' {', or '.join(reasons)}; found {value!r}")
    return problems
