"""graphopt bench: time a bundle against other engines, in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.common import (
    Debug,
    Imports,
    InputShapes,
    Json,
    Output,
    Quiet,
    UnsafeLoad,
    Verbose,
    input_shapes,
    user_code,
)

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.bench import Timing
    from graphopt.bundle import Bundle
    from graphopt.program import Program


def bench(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The folder that `graphopt compile` wrote.")],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="ENGINE", help="torch, torch-compile or onnxruntime. Repeat for several."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="FILE",
            help="The model file that the bundle was made from. [default: BUNDLE with .pt2 or .pt for its suffix]",
        ),
    ] = None,
    input: Annotated[
        str | None, typer.Option("--input", "-i", metavar="FILE.npz", help="Inputs. [default: the model's, or random]")
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option("--factory", metavar="PACKAGE.MODULE:FACTORY", help="Builds the module of a state_dict."),
    ] = None,
    input_shape: InputShapes = None,
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="Threads for each engine.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, max=3600.0, help="Time for each engine.")] = 5.0,
    unsafe_load: UnsafeLoad = False,
    imports: Imports = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Time a bundle, and other engines on the same model: in turns, in the same run."""
    out = Output(json, quiet, verbose)
    with out.working("loading the bundle"):
        from graphopt.bench import bench as measure
        from graphopt.bench import check_rivals, find_model
        from graphopt.bundle import load

        rivals = against or []
        check_rivals(rivals)
        with load(bundle, threads=threads) as loaded:
            file = Path(model) if model else find_model(Path(bundle).resolve())
            program = None
            if file is not None and (rivals or model):
                out.step("capturing the model")
                from graphopt.capture import capture

                user_code(imports, needed=bool(factory) or unsafe_load)
                program = capture(
                    file, input_shapes=input_shapes(input_shape), model_factory=factory, unsafe_load=unsafe_load
                )
            inputs = _inputs(loaded, program, input)
            timings = measure(loaded, program, inputs, rivals, threads=threads, seconds=seconds, progress=out.step)
    data = {"threads": threads, "timings": [timing.to_json() for timing in timings]}
    out.result(data, lambda console: _print(console, timings, threads))


def _inputs(bundle: Bundle, program: Program | None, file: str | None) -> dict[str, Any]:
    from graphopt.arrays import to_numpy
    from graphopt.capture import seeded
    from graphopt.samples import samples_in

    specs = bundle.manifest.inputs
    if file is not None:
        return next((dict(row.inputs) for row in samples_in(file, specs)), {})
    examples = program.example_inputs if program is not None and program.inputs == specs else None
    if examples is not None:
        return {name: to_numpy(tensor) for name, tensor in examples.items()}
    return {spec.name: to_numpy(seeded(spec)) for spec in specs}


def _print(console: Console, timings: list[Timing], threads: int) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("engine")
    for heading in ("min ms", "median ms", "times the bundle's", "largest difference", "runs"):
        table.add_column(heading, justify="right")
    for place, timing in enumerate(timings):
        engine = f"this bundle ({timing.engine})" if place == 0 else timing.engine
        milliseconds = (f"{1e3 * value:.3f}" for value in (timing.min_seconds, timing.median_seconds))
        difference = "" if place == 0 else f"{timing.max_abs_difference:.2g}"
        table.add_row(engine, *milliseconds, f"{timing.ratio:.2f}", difference, str(timing.runs))
    console.print(table)
    console.print(f"{threads} {'thread' if threads == 1 else 'threads'} each, in turns", markup=False)
