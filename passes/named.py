"""Something registered, made from a text: `name` or `name:option=value,option=value`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from graphopt.errors import BadOption


def named_in(kind: str, text: str, known: Mapping[str, Any], make: Callable[..., Any] | None = None) -> Any:
    """What a table has under a name, made with the options behind it. Raises BadOption."""
    name, _, rest = text.partition(":")
    if name not in known:
        raise BadOption(what=f"there is no {kind} {name}", way_out=f"{near(name, known)}known are: {', '.join(known)}")
    options = {}
    # Commas inside a tuple are its own; on the command line others belong to the pass, so `;` is as good.
    for item in filter(None, re.split(r"[,;](?![^(]*\))", rest)):
        key, _, value = item.partition("=")
        options[key.strip().replace("-", "_")] = _value(value.strip())
    if make is None and (unknown := [key for key in options if key not in _fields(known[name])]):
        has = ", ".join(_fields(known[name])) or "none"
        way_out = f"{near(unknown[0], _fields(known[name]))}its options: {has}"
        raise BadOption(what=f"{kind} {name} has no option {unknown[0]}", way_out=way_out)
    try:
        return make(name, **options) if make is not None else known[name](**options)
    except TypeError as error:
        raise BadOption(
            what=f"{kind} {text}: {error}", way_out=f"`graphopt passes {name}` lists its options"
        ) from error


def _fields(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def near(name: str, known: Iterable[str]) -> str:
    """`did you mean ...? ` in front of a list of what is known; nothing where no name is near."""
    found = difflib.get_close_matches(name, known, 1)
    return f"did you mean {found[0]}? " if found else ""


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)
