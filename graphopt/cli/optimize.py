"""graphopt optimize: a model goes in, a smaller one comes out, as a .pt2 again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import reduction as red
from graphopt.cli.common import (
    Debug,
    Factory,
    Imports,
    InputShapes,
    Json,
    Model,
    Output,
    Quiet,
    UnsafeLoad,
    Verbose,
    input_shapes,
    user_code,
)

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.optimize import Outcome
    from graphopt.targets.target import Target


def optimize(
    model: Model,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE.pt2", help="What to write. [default: MODEL-small.pt2 in this folder]"
        ),
    ] = None,
    passes: red.Passes = None,
    recipe: red.RecipeFile = None,
    flops: red.Flops = None,
    macs: red.Macs = None,
    params: red.Params = None,
    bytes_: red.Bytes = None,
    latency: red.Latency = None,
    keep: red.Keep = None,
    criterion: red.Criterion = None,
    allocation: red.Allocation = None,
    round_to: red.RoundTo = None,
    include: red.Include = None,
    exclude: red.Exclude = None,
    compensate: red.Compensate = None,
    calib: Annotated[
        str | None,
        typer.Option("--calib", metavar="FILE.npz|MODULE:FUNCTION", help="Inputs (and labels) that criteria look at."),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", "-t", help="What the result shall run on; see `graphopt targets`.")
    ] = "cpu",
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Compile both for the target and time them, too, if it runs here."),
    ] = True,
    explain: red.Explain = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be cut; write nothing.")] = False,
    input_shape: InputShapes = None,
    factory: Factory = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name. [default: the file's]")] = None,
    unsafe_load: UnsafeLoad = False,
    imports: Imports = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a model smaller under a budget, and write it as a .pt2 file that PyTorch and graphopt read."""
    out = Output(json, quiet, verbose)
    file = Path(output if output is not None else f"{Path(model).stem or 'model'}-small.pt2")
    _check_output(file, model)
    options = red.shared_options(
        flops=flops, macs=macs, params=params, bytes=bytes_, latency=latency, keep=keep, criterion=criterion,
        allocation=allocation, step=round_to, include=include, exclude=exclude, compensate=compensate,
    )  # fmt: skip
    with out.working("importing PyTorch"):
        from graphopt import targets
        from graphopt.capture import capture
        from graphopt.optimize import plan, reduce

        user_code(imports, needed=bool(factory) or unsafe_load or bool(calib and ":" in calib))
        wanted = plan(tuple(passes or ()), recipe, options)
        where = targets.resolve(target)
        out.step("capturing")
        program = capture(
            model, input_shapes=input_shapes(input_shape), model_factory=factory, unsafe_load=unsafe_load, name=name
        )
        done = reduce(program, wanted, calibration=calib, target=where, progress=out.step)
        times = [] if out.silent else red.estimates(done, where)
        if measure and not dry_run and not out.silent:
            times += _measured(done, where, out)
        if not dry_run:
            out.step("writing")
            done.after.save(file)
    out.result(
        _as_json(done, None if dry_run else file, times),
        lambda console: _print(console, done, None if dry_run else file, times, explain),
    )


def _check_output(file: Path, model: str) -> None:
    """Refuse what cannot be written before minutes are spent on it. Raises BadOption, CannotWrite, OutputInTheWay."""
    from graphopt.errors import BadOption
    from graphopt.options import check_place

    if file.suffix != ".pt2":
        raise BadOption(
            what=f"{file}: optimize writes a .pt2 file",
            way_out="name it FILE.pt2, or use `graphopt compile` with the same options for machine code",
        )
    if file.resolve() == Path(model).resolve():
        raise BadOption(what=f"{file} is the model itself", way_out="give the result another name with -o")
    check_place(file, "file")


def _measured(done: Outcome, target: Target, out: Output) -> list[red.Times]:
    """A row for the table: the seconds that it takes, where the target runs here."""
    from graphopt.optimize import measured

    out.step("compiling both to measure")
    both = measured(done, target)
    return [] if both is None else [("measured latency", *both)]


def _as_json(done: Outcome, file: Path | None, times: Sequence[red.Times]) -> dict[str, Any]:
    return {"output": None if file is None else str(file), "name": done.after.name, **red.as_json(done, times)}


def _print(console: Console, done: Outcome, file: Path | None, times: Sequence[red.Times], explain: bool) -> None:
    console.print(f"{done.after.name}: {'nothing is written' if file is None else f'written to {file}'}", markup=False)
    red.print_outcome(console, done, times, explain=explain)
