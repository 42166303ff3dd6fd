"""graphopt inspect: what a model or a bundle consists of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.common import (
    Debug,
    Factory,
    Imports,
    InputShapes,
    Json,
    Output,
    Quiet,
    UnsafeLoad,
    Verbose,
    amount,
    input_shapes,
    user_code,
)
from graphopt.cli.sparse import print_sparse

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.bundle import Bundle
    from graphopt.cost import Summary
    from graphopt.program import Program


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model file or a bundle folder.")],
    input_shape: InputShapes = None,
    factory: Factory = None,
    unsafe_load: UnsafeLoad = False,
    imports: Imports = None,
    axes: Annotated[
        bool, typer.Option("--axes", help="Show the axes of each tensor instead, and which of them may shrink.")
    ] = False,
    pinned: Annotated[bool, typer.Option("--pinned", help="Show only the axes that must not shrink, and why.")] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Show the sequences of tokens that passes may reduce, and their blocks.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show a model's layers, shapes, FLOPs, parameters, bytes, sparse weights, or a bundle's manifest and kernels."""
    out = Output(json, quiet, verbose)
    if Path(model).is_dir():
        if axes or pinned or tokens:
            from graphopt.errors import BadOption

            raise BadOption(
                what="a bundle has neither axes nor blocks any more", way_out="inspect the model that it was made from"
            )
        with out.working("checking the bundle"):
            from graphopt.bundle import load

            bundle = load(model)
        out.result(bundle.manifest.to_json(), lambda console: _print_bundle(console, bundle))
        return
    with out.working("importing PyTorch"):
        from graphopt.capture import capture
        from graphopt.cli.axes import axes_as_json, axes_of, print_axes
        from graphopt.cost import summary

        user_code(imports, needed=bool(factory) or unsafe_load)
        out.step("capturing")
        program = capture(model, input_shapes=input_shapes(input_shape), model_factory=factory, unsafe_load=unsafe_load)
        if axes or pinned:
            out.step("finding axes")
            found = axes_of(program)
            data = axes_as_json(found, pinned_only=pinned)
            out.result(data, lambda console: print_axes(console, found, pinned_only=pinned))
            return
        if tokens:
            from graphopt.cli.tokens import print_streams, streams_of

            out.step("finding blocks")
            streams = streams_of(program)
            out.result(streams, lambda console: print_streams(console, streams))
            return
        cost = summary(program)
    out.result(_as_json(program, cost), lambda console: _print_program(console, program, cost))


def _as_json(program: Program, cost: Summary) -> dict[str, Any]:
    def specs(items: Any) -> list[dict[str, Any]]:
        return [{"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype} for spec in items]

    def costs(item: Any) -> dict[str, int]:
        return {key: getattr(item, key) for key in ("flops", "macs", "params", "bytes_read", "bytes_written")}

    return {
        "name": program.name,
        "inputs": specs(program.inputs),
        "outputs": specs(program.outputs),
        "layers": [
            {"name": row.name, "where": row.where, "op": row.op, "shape": list(row.shape), **costs(row.cost)}
            for row in cost.rows
        ],
        "operators": cost.ops,
        "total": {**costs(cost.total), "sparse_flops": cost.sparse_flops, "stored_bytes": cost.stored_bytes},
        "annotations": _annotations(program, cost),
        "records": [record.to_json() for record in program.records],
    }


def _annotations(program: Program, cost: Summary) -> list[dict[str, Any]]:
    """A row for each annotated weight: name, shape, format, shares, FLOPs of its calls by dense and sparse kernels."""
    from graphopt.weights import weights

    known = weights(program.exported)
    costs = {row.name: row for row in cost.rows}
    rows = []
    for name, annotation in program.annotations.items():
        calls = [costs[use.call.name] for use in known[name].uses]
        flops = {"flops": sum(row.cost.flops for row in calls), "sparse_flops": sum(row.sparse_flops for row in calls)}
        rows.append({"tensor": name, "shape": list(known[name].value.shape), **annotation.to_json(), **flops})
    return rows


def _print_annotations(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("sparse weight", "shape", "format"):
        table.add_column(heading, overflow="fold")
    for heading in ("kept", "stored", "FLOPs", "left"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shares = (f"{row[key]:.1%}" for key in ("density", "stored"))
        numbers = (amount(row[key]) for key in ("flops", "sparse_flops"))
        shape = "x".join(map(str, row["shape"]))
        table.add_row(_plain(row["tensor"]), shape, row["format"], *shares, *numbers)
    console.print(table)


def _print_program(console: Console, program: Program, cost: Summary) -> None:
    from rich.table import Table

    console.print(f"{program.name}", markup=False)
    for label, specs in (("takes", program.inputs), ("gives", program.outputs)):
        for spec in specs:
            console.print(f"  {label} {spec}", markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layer", "operator", "shape"):
        table.add_column(heading, overflow="fold")
    for heading in ("FLOPs", "parameters", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in cost.rows:
        moved = row.cost.bytes_read + row.cost.bytes_written
        shape = "x".join(map(str, row.shape))
        numbers = (amount(value) if value else "" for value in (row.cost.flops, row.cost.params, moved))
        table.add_row(_plain(row.where), _plain(row.op), shape, *numbers)
    moved = cost.total.bytes_read + cost.total.bytes_written
    table.add_section()
    totals = (amount(value) for value in (cost.total.flops, cost.total.params, moved))
    table.add_row("total", f"{len(cost.rows)} operators", "", *totals)
    if program.annotations:
        table.add_row("with sparse kernels", "", "", amount(cost.sparse_flops), "", "")
    console.print(table)
    if program.annotations:
        _print_annotations(console, _annotations(program, cost))
    console.print(f"weights: {amount(cost.stored_bytes, 'B')}; bytes: read and written, without fusion", markup=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _parameter(key: str, value: int | str) -> str:
    """A kernel's parameter; `kept` is the share of the weight's elements that lie in blocks that are not zero."""
    if key == "kept":
        return f"kept={float(value):.1%}"
    return f"{key}={value:,}" if isinstance(value, int) else f"{key}={value}"


def _print_bundle(console: Console, bundle: Bundle) -> None:
    from rich.table import Table

    manifest = bundle.manifest
    console.print(f"{manifest.name} for {manifest.target['spec']} ({manifest.target['isa']})", markup=False)
    for label, specs in (("takes", manifest.inputs), ("gives", manifest.outputs)):
        for spec in specs:
            console.print(f"  {label} {spec}", markup=False)
    console.print(
        f"  {amount(manifest.flops, 'FLOPs')}, {amount(manifest.params)} parameters, "
        f"weights {amount(manifest.weights_bytes, 'B')}, workspace {amount(manifest.workspace_bytes, 'B')}\n"
        f"  verification: {manifest.verification}\n"
        f"  made with {', '.join(f'{key} {value}' for key, value in sorted(manifest.versions.items()))}",
        markup=False,
    )
    for record in manifest.records:
        changed = ", ".join(f"{count} x {what}" for what, count in record.changed.items()) or "nothing to do"
        console.print(f"  pass {record.name}: {changed}", markup=False)
    kernels = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("kernel", "template", "stands for", "parameters"):
        kernels.add_column(heading, overflow="fold")
    for kernel in manifest.kernels:
        parameters = " ".join(_parameter(key, value) for key, value in sorted(kernel["parameters"].items()))
        cells = (kernel["symbol"], kernel["template"], kernel["where"], parameters)
        kernels.add_row(*(_plain(str(cell)) for cell in cells))
    console.print(kernels)
    if manifest.sparse_weights:
        print_sparse(console, manifest.sparse_weights)
    for decline in manifest.declined:
        console.print(f"  no template for {decline['where']}: {decline['reason']}", markup=False)
    files = Table(box=None, pad_edge=False, header_style="bold")
    files.add_column("file")
    files.add_column("bytes", justify="right")
    for name, entry in manifest.files.items():
        files.add_row(_plain(name), f"{entry.bytes:,}")
    console.print(files)
