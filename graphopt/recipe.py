"""Recipes: which passes run, with which options, under which budget. From the command line's flags or a TOML file.

criterion = "taylor"            # options for every pass below that has them
flops = 0.5

[[pass]]
name = "prune-channels"

[[pass]]
name = "prune-heads"
criterion = "l2"                # its own come first

Passes that the command line names run behind those of the file, and its options come before the shared ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.budget import KINDS, Budget
from graphopt.errors import BadRecipe, UnknownPass
from graphopt.shared_budget import SHARE, together

if TYPE_CHECKING:
    from graphopt.passes.base import Pass

# What options are called on the command line, where passes call them something else.
_ALIASES = {"round_to": "step"}
# Below this an amount without a unit is taken for a slip: 1.5 for 1.5G, or 50 for 50%.
_LEAST_AMOUNT = 1000
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_AMOUNT = re.compile(r"(?P<number>\d*\.?\d+(e[+-]?\d+)?)\s*(?P<unit>[a-z%]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Step:
    """One pass by name, and its options as they were written."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Passes in order. `shared` are options for every pass that has them and does not give its own."""

    steps: tuple[Step, ...]
    shared: Mapping[str, Any]
    name: str = "recipe"


def parse_budget(kind: str, text: object) -> Budget:
    """`0.5`, `50%`: the share that stays; `1.2G`, `8ms`: the amount. Raises BadRecipe."""
    match = _AMOUNT.fullmatch(str(text).strip())
    if match is None:
        raise BadRecipe(what=f"--{kind} {text}", reason="is no amount", way_out=_amounts(kind))
    number, unit = float(match["number"]), match["unit"].lower()
    if not math.isfinite(number):
        raise BadRecipe(what=f"--{kind} {text}", reason="is infinite", way_out=_amounts(kind))
    if unit == "%":
        number, unit = number / 100, ""
    if number <= 0 or (match["unit"] == "%" and number > 1):
        raise BadRecipe(what=f"--{kind} {text}", reason="is no share of anything", way_out=_amounts(kind))
    if unit == "" and number <= 1:
        return Budget(kind, number)
    units = _SECONDS if kind == "latency" else _UNITS
    unit = unit.removesuffix("b") if kind == "bytes" else unit
    if unit not in units or (kind == "latency" and not unit):
        raise BadRecipe(what=f"--{kind} {text}", reason="has no unit that fits", way_out=_amounts(kind))
    if not match["unit"] and number < _LEAST_AMOUNT:
        reason = "is neither a share, which is at most 1, nor an amount with a unit"
        raise BadRecipe(what=f"--{kind} {text}", reason=reason, way_out=_amounts(kind))
    return Budget(kind, number * units[unit], absolute=True)


def _amounts(kind: str) -> str:
    unit = {"latency": "8ms", "bytes": "1.5MB", "params": "1.5M"}.get(kind, "1.5G")
    return f"give the share that stays, as --{kind} 0.5, or an amount with its unit, as --{kind} {unit}"


def parse_step(text: str) -> Step:
    """`prune-channels`, `prune-channels:criterion=l1,keep=0.5` or `merge-tokens:counts=40,30`. Raises BadRecipe."""
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    last = ""
    for item in filter(None, re.split(r",(?![^(]*\))", rest)) if colon else ():  # not inside a tuple
        key, equals, value = item.partition("=")
        if not equals and last and re.fullmatch(r"\s*\d+\s*", item):  # one more number of the last option
            options[last] += f",{item.strip()}"
            continue
        if not equals:
            raise BadRecipe(what=f"--pass {text}", reason=f"{item!r} is not name=value", way_out=_PASS)
        last = _key(key)
        options[last] = value.strip()
    return Step(name.strip(), options)


def _key(text: str) -> str:
    """The option that a name from the user is."""
    name = text.strip().replace("-", "_")
    return _ALIASES.get(name, name)


_PASS = "write --pass NAME or --pass NAME:option=value,option=value; `graphopt passes NAME` lists the options"


def read(path: str | os.PathLike[str]) -> Recipe:
    """A recipe from a TOML file.

    Raises:
        BadRecipe: the file cannot be read, is no TOML, or has something in it that no recipe has.
    """
    file = Path(path)
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text file"
        raise BadRecipe(what=file, reason=reason, way_out="name a TOML file with a [[pass]] table a pass") from error
    except tomllib.TOMLDecodeError as error:
        raise BadRecipe(what=file, reason=f"is no TOML: {error}", way_out="https://toml.io shows the form") from error
    tables = data.pop("pass", None)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise BadRecipe(
            what=file, reason="has no passes", way_out='write a [[pass]] table with a name = "..." for each'
        )
    name = str(data.pop("name", file.stem))
    steps = []
    for number, table in enumerate(tables, 1):
        if not isinstance(table.get("name"), str):
            raise BadRecipe(what=file, reason=f"pass {number} has no name", way_out='write name = "prune-channels"')
        options = _keyed(file, {key: value for key, value in table.items() if key != "name"})
        steps.append(Step(table["name"], options))
    return Recipe(tuple(steps), _keyed(file, data), name)


def _keyed(file: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """A table by the names of options. Raises BadRecipe where two of its keys are one option."""
    keyed = {_key(key): value for key, value in table.items()}
    if len(keyed) < len(table):
        raise BadRecipe(what=file, reason=f"{', '.join(table)}: one option twice", way_out="give each option once")
    return keyed


def passes_of(recipe: Recipe, **context: Any) -> list[Pass]:
    """The passes of a recipe, ready to run.

    Args:
        recipe: what was asked for.
        context: values for options of these names where a pass has them and the recipe is silent (calibration, target).

    Raises:
        UnknownPass: there is no such pass; says which is near.
        BadRecipe: a pass has no such option, or the value is of another kind, or no pass takes a shared option.
    """
    from graphopt.passes import PASSES, load
    from graphopt.passes.reduction import Reduction

    made, used = [], set[str]()
    for step in recipe.steps:
        if step.name not in PASSES:
            near = difflib.get_close_matches(step.name, PASSES, 1)
            raise UnknownPass(name=step.name, near=f"; did you mean {near[0]}?" if near else "")
        cls = load(step.name)
        types_of = options_of(cls)
        options = step.options
        if SHARE in options and issubclass(cls, Reduction):
            options = {key: value for key, value in options.items() if key != SHARE}
        own = _as_options(options, types_of, step.name, strict=True)
        shared = _as_options(recipe.shared, types_of, step.name, strict=False)
        used |= _taken(recipe.shared, types_of)
        if "keep" in own:
            shared.pop("budget", None)
        given = {key: value for key, value in context.items() if key in types_of and value is not None}
        made.append(cls(**{**given, **shared, **own}))
    if idle := [key for key in recipe.shared if key not in used]:
        names = ", ".join(step.name for step in recipe.steps)
        flags = {option: f"--{alias.replace('_', '-')}" for alias, option in _ALIASES.items()}
        shown = ", ".join(flags.get(key, key) for key in idle)
        raise BadRecipe(
            what=recipe.name,
            reason=f"{shown}: {names} has no such option",
            way_out="leave it out; `graphopt passes NAME` lists what a pass takes",
        )
    return together(made, [step.options for step in recipe.steps], recipe.shared, recipe.name)


def options_of(cls: type[Pass]) -> dict[str, Any]:
    """The options of a pass and their types, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _taken(options: Mapping[str, Any], types_of: Mapping[str, Any]) -> set[str]:
    return {key for key in options if key in types_of or (key in KINDS and "budget" in types_of)}


def _as_options(options: Mapping[str, Any], types_of: Mapping[str, Any], name: str, *, strict: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in options.items():
        if key in KINDS and "budget" in types_of:
            if "budget" in result:
                raise BadRecipe(what=name, reason="has two budgets", way_out=f"give one of {', '.join(KINDS)}")
            result["budget"] = parse_budget(key, value)
        elif key in types_of:
            result[key] = _as_type(value, types_of[key], f"{name}: {key}")
        elif strict:
            near = difflib.get_close_matches(key, types_of, 1)
            known = ", ".join(types_of) or "no options"
            hint = f"did you mean {near[0]}? " if near else ""
            raise BadRecipe(what=name, reason=f"it has no option {key}", way_out=f"{hint}it has {known}")
    return result


def _as_type(value: Any, wanted: Any, what: str) -> Any:
    """A value from TOML or from text as a field's type. Raises BadRecipe."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        if value in ("none", "None", None) and type(None) in args:
            return None
        for kind in [kind for kind in (bool, int, float, tuple, str) if any(_is(arg, kind) for arg in args)]:
            try:
                return _as_type(value, next(arg for arg in args if _is(arg, kind)), what)
            except BadRecipe:
                continue
        if Any in args:
            return value
    elif wanted is Any or wanted is object:
        return value
    elif origin is tuple:
        items = re.split(r"[;|,]", value.strip("()")) if isinstance(value, str) else value
        if isinstance(items, Sequence):
            return tuple(_as_type(item, args[0], what) for item in items)
    elif origin is typing.Literal:
        if value in args:
            return value
        raise BadRecipe(what=what, reason=f"is {value!r}", way_out=f"it is one of {', '.join(map(str, args))}")
    elif wanted is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
        if isinstance(value, bool) or str(value).lower() in words:
            return value if isinstance(value, bool) else words[str(value).lower()]
    elif wanted in (int, float) and not isinstance(value, bool):
        try:
            return wanted(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(wanted, type) and isinstance(value, wanted):
        return value
    raise BadRecipe(what=what, reason=f"is {value!r}", way_out=f"it takes {_in_words(wanted)}")


def _in_words(wanted: Any) -> str:
    """What a user may write where a type is wanted."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(arg) for arg in args if arg is not type(None)))
    if origin is tuple:
        several = {int: "whole numbers", float: "numbers"}.get(args[0], "names")
        return f"{several} with commas between them"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(wanted, getattr(wanted, "__name__", str(wanted)))


def _is(arg: Any, kind: type) -> bool:
    return arg is kind or typing.get_origin(arg) is kind or (kind is str and typing.get_origin(arg) is typing.Literal)
