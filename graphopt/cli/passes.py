"""graphopt passes: what can be done to a model, with parameters and papers."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.common import Debug, Json, Output, Quiet, Verbose

if TYPE_CHECKING:
    from rich.console import Console

_OPTION = re.compile(r"(?P<names>[a-z_]+(?:, [a-z_]+)*): (?P<text>.+)")
_SOURCE = re.compile(r"^Sources?:\s*(?P<text>.+?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)


def passes(
    name: Annotated[
        str | None, typer.Argument(help="A pass, criterion, allocation, score, reducer or schedule, to be explained.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List the passes and what they are made of (criteria, scores, schedules, ...), or explain one of them."""
    out = Output(json, quiet, verbose)
    with out.working("importing PyTorch"):
        entries = catalogue()
    if name is None:
        out.result({"passes": entries}, lambda console: _print_all(console, entries))
        return
    from graphopt.errors import UnknownPass

    found = [entry for entry in entries if entry["name"] == name]
    if not found:
        import difflib

        near = difflib.get_close_matches(name, [entry["name"] for entry in entries], 1)
        raise UnknownPass(name=name, near=f"; did you mean {near[0]}?" if near else "")
    out.result({"passes": found}, lambda console: _print_one(console, found))


def catalogue() -> list[dict[str, Any]]:
    """Everything registered (passes, criteria, scores, ...): kind, name, summary, text, source, options."""
    from graphopt.passes import CANONICALISE, PASSES, allocation, criteria, load
    from graphopt.passes.tokens import reducers, schedule, scores

    rows = [
        _entry("lossless pass" if load(name).lossless else "reducing pass", name, load(name), name in CANONICALISE)
        for name in PASSES
    ]
    rows += [_entry("criterion", name, criteria.load(name), False) for name in criteria.CRITERIA]
    rows += [_entry("allocation", name, allocation.load(name), False) for name in allocation.ALLOCATIONS]
    rows += [_entry("score of tokens", name, cls, False) for name, cls in scores.SCORES.items()]
    rows += [_entry("reducer of tokens", name, cls, False) for name, cls in reducers.REDUCERS.items()]
    rows += [_described("schedule of tokens", name, each.text) for name, each in schedule.SCHEDULES.items()]
    return rows


def _entry(kind: str, name: str, cls: type, default: bool) -> dict[str, Any]:
    texts = _option_texts(cls)
    options = [
        {
            "name": field.name.replace("_", "-"),
            "type": str(field.type),
            "default": _default(field),
            "text": texts.get(field.name),
        }
        for field in dataclasses.fields(cls)
        if field.init
    ]
    described = _described(kind, name, inspect.cleandoc(cls.__doc__ or ""))
    return {**described, "options": options, "by_default": default}


def _described(kind: str, name: str, text: str) -> dict[str, Any]:
    source = _SOURCE.search(text)
    return {
        "kind": kind,
        "name": name,
        "summary": " ".join(text.partition("\n\n")[0].split()),
        "text": text,
        "source": " ".join(source["text"].split()) if source else None,
        "options": [],
        "by_default": False,
    }


def _option_texts(cls: type) -> dict[str, str]:
    """What the docstrings of a class and of those that it builds on say about fields: `name, name: text`."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        names: list[str] = []
        indent = 0
        for whole in inspect.cleandoc(base.__doc__ or "").splitlines():
            line = whole[indent:]
            if line == "Attributes:":
                indent = 4
            elif match := _OPTION.fullmatch(line):
                names = match["names"].split(", ")
                found |= dict.fromkeys(names, match["text"])
            elif names and line.startswith("    "):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return {name: re.sub(r"[;,]?( or| and)?$", "", text) for name, text in found.items()}


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "(required)"
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _print_all(console: Console, entries: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(kind, no_wrap=True)
        table.add_column("what it does", overflow="fold")
        table.add_column("options", overflow="fold")
        for entry in entries:
            if entry["kind"] == kind:
                options = ", ".join(option["name"] for option in entry["options"])
                table.add_row(entry["name"], escape(entry["summary"]), escape(options))
        console.print(table)
        console.print()
    console.print("`graphopt passes NAME` explains one: its rewrite, options and paper.", markup=False)


def _print_one(console: Console, found: list[dict[str, Any]]) -> None:
    for entry in found:
        console.print(f"{entry['name']} ({entry['kind']})\n\n{entry['text']}", markup=False)
        if entry["options"]:
            console.print("\noptions:", markup=False)
        for option in entry["options"]:
            default = "" if option["default"] == "(required)" else f" = {option['default']}"
            console.print(f"  {option['name']}: {option['type']}{default}", markup=False)
            if option["text"]:
                lines = textwrap.wrap(option["text"], 110)
                console.print("\n".join(f"      {line}" for line in lines), markup=False)
