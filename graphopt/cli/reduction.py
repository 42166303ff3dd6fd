"""The options of `optimize` and `compile` that say what shall be cut, and how what was cut is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.common import amount

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.optimize import Agreement, Outcome
    from graphopt.record import Record
    from graphopt.targets.target import Target

# A row of the table: what it is, and seconds before and after.
Times = tuple[str, float, float]
_PANEL = "What shall be cut"

Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="NAME[:option=value,...]",
        help="A reducing pass; `graphopt passes` lists them. Repeatable, in order. [default with a budget: prune]",
        rich_help_panel=_PANEL,
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="FILE.toml", help="Passes and options from a file; those of --pass run behind them."
    ),
]
Flops = Annotated[str | None, typer.Option("--flops", metavar="SHARE|N", help="FLOPs that may stay: 0.5, 50%, 1.2G.")]
Macs = Annotated[str | None, typer.Option("--macs", metavar="SHARE|N", help="The same in multiply-adds.")]
Params = Annotated[str | None, typer.Option("--params", metavar="SHARE|N", help="Parameters that may stay: 0.5, 10M.")]
Bytes = Annotated[str | None, typer.Option("--bytes", metavar="SHARE|N", help="Bytes of weights that may stay.")]
Latency = Annotated[
    str | None, typer.Option("--latency", metavar="SHARE|TIME", help="Time on --target that may stay: 0.5, 8ms.")
]
Keep = Annotated[
    float | None,
    typer.Option("--keep", min=0.0, max=1.0, help="Instead of a budget: the share of each axis that stays."),
]
Criterion = Annotated[
    str | None, typer.Option("--criterion", metavar="NAME", help="What matters. [default: the pass's own]")
]
Allocation = Annotated[
    str | None, typer.Option("--allocation", metavar="NAME", help="How much goes where. [default: the pass's own]")
]
RoundTo = Annotated[
    str | None,
    typer.Option(
        "--round-to",
        metavar="N",
        help="What stays is a multiple of N, on axes longer than N. [default: what the target wants]",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include", metavar="PATTERN", help="Only axes that are outputs of tensors like `layer3.*`. Repeatable."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="PATTERN", help="No axis that is an output of tensors like `head*`. Repeatable."),
]
Compensate = Annotated[
    bool | None,
    typer.Option(
        "--compensate/--no-compensate",
        help="Fit the layers behind a cut anew on the calibration data. [default: where --calib is given]",
    ),
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Print for each axis what was cut, why, and what it buys on the target.")
]


def shared_options(**given: Any) -> dict[str, Any]:
    """The flags that were given, as options of passes."""
    options = {key: value for key, value in given.items() if value is not None and value != []}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def estimates(done: Outcome, target: Target) -> list[Times]:
    """A row for the table: what the program is estimated to take on the target; none where zeros would save time."""
    from graphopt.optimize import estimated

    if done.after.annotations:
        return []  # the estimate is of dense kernels; `measured` and `compile --explain` know of zeros
    return [("estimated latency", *estimated(done, target))]


def as_json(done: Outcome, times: Sequence[Times]) -> dict[str, Any]:
    """What was cut and what was lost, as plain JSON values."""
    from graphopt.optimize import remarks, sizes

    return {
        "latency_seconds": {label.split()[0]: {"before": a, "after": b} for label, a, b in times},
        "notes": remarks(done.records),
        "before": sizes(done.captured),
        "after": sizes(done.after),
        "agreement": [row.to_json() for row in done.agreement],
        "calibration": {"origin": done.calibration.origin, "is_example": done.calibration.is_example},
        "records": [record.to_json() for record in done.records],
    }


def print_outcome(console: Console, done: Outcome, times: Sequence[Times], *, explain: bool) -> None:
    """What each pass did, the table before and after, and how far the outputs moved."""
    from graphopt.optimize import sizes

    print_records(console, done.records, explain=explain)
    print_sizes(console, sizes(done.captured), sizes(done.after), times)
    print_agreement(console, done.agreement, done.calibration.origin)
    if done.calibration.is_example and done.agreement:
        console.print("compared on the example inputs only; --calib takes real ones", markup=False)


def print_sizes(console: Console, before: dict[str, int], after: dict[str, int], times: Sequence[Times]) -> None:
    """The table before and after."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for heading in ("before", "after", "stays", "factor"):
        table.add_column(heading, justify="right", no_wrap=True)
    labels = {
        "flops": "FLOPs",
        "sparse_flops": "FLOPs, sparse",
        "macs": "multiply-adds",
        "params": "parameters",
        "bytes": "weights",
    }
    sparse = any(side["sparse_flops"] != side["flops"] for side in (before, after))
    for key, label in labels.items():
        if key == "sparse_flops" and not sparse:
            continue
        unit = "B" if key == "bytes" else ""
        shown = [amount(side[key], unit) for side in (before, after)]
        table.add_row(label, *shown, *_ratio(before[key], after[key]))
    for label, first, second in times:
        shown = [f"{value * 1e3:.3g} ms" for value in (first, second)]
        table.add_row(label, *shown, *_ratio(first, second))
    console.print(table)


def _ratio(before: float, after: float) -> tuple[str, str]:
    return (f"{after / before:.1%}", f"{before / after:.2f}x") if before and after else ("-", "-")


def print_agreement(console: Console, rows: Sequence[Agreement], origin: str) -> None:
    """How far the outputs are from those of the original."""
    for row in rows:
        top1 = f", same top entry in {row.top1:.1%}" if row.top1 is not None else ""
        console.print(
            f"{row.output}: relative error {row.relative_error:.3g}, cosine {row.cosine:.4f}{top1} "
            f"({row.samples} rows of {origin})",
            markup=False,
        )


def print_records(console: Console, records: Sequence[Record], *, explain: bool) -> None:
    """What each pass did; with `explain` for every axis, and why others were left alone."""
    from rich.markup import escape
    from rich.table import Table

    for record in records:
        changed = ", ".join(f"{count} x {what}" for what, count in record.changed.items()) or "nothing to do"
        console.print(f"pass {record.name}: {changed}", markup=False)
        if places := record.places:
            steps = ", ".join(f"{left} {where}" for where, _, left in places)
            console.print(f"  tokens: {places[0][1]}, then {steps}", markup=False)
        if not explain:
            continue
        if record.details:
            for rows in _tables(record.details):
                headings = list(dict.fromkeys(key for row in rows for key in row))
                table = Table(box=None, pad_edge=False, header_style="bold")
                for heading in headings:
                    numeric = all(isinstance(row.get(heading, 0), (int, float)) for row in rows)
                    table.add_column(heading.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
                for row in rows:
                    table.add_row(*(escape(_cell(heading, row.get(heading))) for heading in headings))
                console.print(table)
        for decline in record.declined:
            console.print(f"  left alone: {decline.where}: {decline.reason}", markup=False)


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows by the table that they are of: those that share a heading, one after the other."""
    tables: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if tables and not row.keys().isdisjoint(key for each in tables[-1] for key in each):
            tables[-1].append(row)
        else:
            tables.append([row])
    return tables


def _cell(heading: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return amount(value)
    return str(value)
