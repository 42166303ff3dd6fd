"""What `graphopt inspect --axes` and `--pinned` show: the axes of a program, and why some must not shrink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.axes import Axes, Axis
    from graphopt.program import Program


def axes_of(program: Program) -> Axes:
    """The axes of a program after the passes that inference wants done first."""
    from graphopt.axes import infer
    from graphopt.passes import PREPARE
    from graphopt.passes.base import run_passes

    return infer(run_passes(program, PREPARE, check=False))


def axes_as_json(axes: Axes, *, pinned_only: bool) -> dict[str, Any]:
    """The program's rows, its atoms and the operators without a rule."""
    rows = [{"name": name, "what": what, "axes": shown} for name, what, shown in axes.rows()]
    return {
        "name": axes.program.name,
        "rows": [] if pinned_only else rows,
        "axes": [_entry(axes, atom) for atom in _shown(axes, pinned_only)],
        "unknown": [{"where": decline.where, "reason": decline.reason} for decline in axes.unknown],
    }


def print_axes(console: Console, axes: Axes, *, pinned_only: bool) -> None:
    """The program with its axes, a table of these, and the operators without a rule."""
    from rich.markup import escape
    from rich.table import Table

    if not pinned_only:
        for line in axes.listing():
            console.print(line, markup=False)
        console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("axis", no_wrap=True)
    table.add_column("extent", justify="right", no_wrap=True)
    for heading in ("role", "where", "may shrink", "statistics over it"):
        table.add_column(heading, overflow="fold")
    entries = [_entry(axes, atom) for atom in _shown(axes, pinned_only)]
    for entry in entries:
        state = (
            f"no: {entry['pinned']}"
            if entry["pinned"]
            else "in no tensor of the model's"
            if not entry["free"]
            else "yes"
            if entry["multiple"] == 1
            else f"to multiples of {entry['multiple']}"
        )
        cells = (entry["label"], str(entry["extent"]), entry["role"], entry["where"], state)
        table.add_row(*map(escape, cells), escape(", ".join(entry["statistics"])))
    if entries:
        console.print(table)
    free = len(axes.free())
    console.print(f"{len(axes.atoms)} axes, {free} of them may shrink", markup=False)
    for decline in axes.unknown:
        console.print(f"  no rule at {decline.where}: {decline.reason}", markup=False)


def _shown(axes: Axes, pinned_only: bool) -> list[Axis]:
    return [atom for atom in axes.atoms if atom.pinned is not None or not pinned_only]


def _entry(axes: Axes, atom: Axis) -> dict[str, Any]:
    stored = axes.stored_in(atom)
    return {
        "label": atom.label,
        "extent": atom.extent,
        "role": axes.role(atom),
        "where": axes.where(atom),
        "tensors": [{"name": axes.tensor_name(name), "dim": dim, "summed": summed} for name, dim, summed in stored],
        "pinned": atom.pinned,
        "free": atom.pinned is None and bool(stored),
        "multiple": axes.multiple(atom),
        "statistics": list(axes.statistics.get(atom, ())),
    }
