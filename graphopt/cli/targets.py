"""graphopt targets: what can be built and run here, and what is missing for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphopt.cli.common import Debug, Json, Output, Quiet, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.targets import Availability


def targets(json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """List the targets: what can be built and run here, and what is missing for the rest."""
    out = Output(json, quiet, verbose)
    with out.working("looking for tools"):
        from graphopt.targets import availability

        rows = availability()
    out.result({"targets": [_as_json(row) for row in rows]}, lambda console: _print(console, rows))


def _as_json(row: Availability) -> dict[str, Any]:
    return {
        "target": row.spec,
        "about": row.about,
        "builds": row.builds,
        "runs_with": list(row.runners),
        "missing": list(row.missing),
    }


def _print(console: Console, rows: list[Availability]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("target", "vector unit", "builds", "runs with", "missing"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        builds, runs = "yes" if row.builds else "no", ", ".join(row.runners) or "-"
        table.add_row(row.spec, escape(row.about), builds, runs, escape("; ".join(row.missing)))
    console.print(table)
