"""graphopt explain: pictures of what a reduced model does with an input."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.common import Debug, Imports, Json, Output, Quiet, Verbose, user_code

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.arrays import Array
    from graphopt.record import Record
    from graphopt.spec import TensorSpec

WHATS = ("tokens",)


def explain(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="tokens: which of them survive, place by place.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2 file, or a bundle compiled with trace=true.")],
    image: Annotated[
        str | None,
        typer.Option(
            "--image", metavar="[NAME=]FILE", help="The image that the model sees. [default: its examples, undrawn]"
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE.png", help="What to write; .svg and .pdf, too.")
    ] = "tokens.png",
    mean: Annotated[
        str, typer.Option("--mean", help="Of each channel, of pixels from 0 to 1: 0.485,0.456,0.406.")
    ] = "0",
    std: Annotated[str, typer.Option("--std", help="What pixels are divided by then: 0.229,0.224,0.225.")] = "1",
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="ROWSxCOLUMNS", help="Of patches. [default: square ones]")
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", metavar="NAME=FILE.npy", help="Another input. [default: the model's example]"),
    ] = None,
    imports: Imports = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Draw which tokens of an image survive in a model whose tokens are reduced, place by place.

    Models whose input is no image, such as a diffusion transformer of latents, run on their example inputs or --input.
    """
    out = Output(json, quiet, verbose)
    from graphopt.errors import BadOption

    if what not in WHATS:
        raise BadOption(what=f"explain {what}: there is no such thing", way_out=f"known are: {', '.join(WHATS)}")
    averages, deviations, file = _numbers("mean", mean), _numbers("std", std), Path(output)
    shape = _grid(grid)
    with out.working("importing PyTorch"):
        from graphopt.options import check_place
        from graphopt.token_picture import Panel, blank, draw, grid_of, image_input, read_image
        from graphopt.token_trace import chain, is_traced

        check_place(file, "file")
        user_code(imports, needed=False)
        name, specs, records, run = _opened(model)
        given, picture, title = _others(input or []), None, name
        if image is not None:
            wanted, _, source = ("", "", image) if Path(image).is_file() else image.rpartition("=")
            spec = image_input(name, specs, wanted or None)
            given[spec.name], picture = read_image(source, spec, averages, deviations)
            title = f"{name}: {Path(source).name}"
        out.step("running")
        results, known = run(given), [place for record in records for place in record.places]
        if len(known) != sum(is_traced([name]) for name in results):
            known = []
        parts = chain(results, [left for _, _, left in known])
        panels, rows = [], []
        for number, part in enumerate(parts):
            where, _, left = known[number] if known else (f"place {number}", 0, int(part[0].max()) + 1)
            panels.append(Panel(f"{where}: {left} of {part.shape[1]}", part[0]))
            rows.append({"name": where, "tokens": part.shape[1], "kept": left, "part_of": part[0].tolist()})
        height, width = (1, 1) if picture is None else picture.shape[:2]
        patches = grid_of(parts[0].shape[1], height, width, shape)
        draw(file, blank(patches) if picture is None else picture, panels, patches, title)
    data = {"output": str(file), "name": name, "places": rows}
    out.result(data, lambda console: _print(console, file, rows))


def _opened(model: str) -> tuple[str, Sequence[TensorSpec], Sequence[Record], Any]:
    """Name, inputs and records of a bundle or a model, and what runs it. Raises NoTokens."""
    from graphopt.errors import NoTokens
    from graphopt.token_trace import is_traced, traced

    if Path(model).is_dir():
        from graphopt.bundle import load

        bundle = load(model)
        manifest = bundle.manifest
        if not is_traced([spec.name for spec in manifest.outputs]):
            raise NoTokens(
                file=model,
                reason="does not say where tokens go",
                way_out="compile it with --pass NAME:trace=true, or give the .pt2 that `graphopt optimize` wrote",
            )
        return bundle.name, manifest.inputs, manifest.records, bundle.run
    from graphopt.capture import capture

    program = traced(capture(model))
    if not is_traced([spec.name for spec in program.outputs]):
        raise NoTokens(
            file=model,
            reason="has no places where tokens are reduced",
            way_out="reduce them first: graphopt optimize MODEL --pass merge-tokens --flops 0.6 -o small.pt2; "
            "semantic-tokens wants trace=true",
        )

    def run(arrays: Mapping[str, Array]) -> dict[str, Array]:
        from graphopt.arrays import fit_inputs, to_numpy, to_torch

        examples = {key: to_numpy(value) for key, value in (program.example_inputs or {}).items()}
        fitted = fit_inputs(program.name, program.inputs, {**examples, **arrays}, None)
        pairs = zip(program.inputs, fitted, strict=True)
        results = program.run({spec.name: to_torch(array, spec.torch_dtype) for spec, array in pairs})
        return {key: to_numpy(value) for key, value in results.items()}

    return program.name, program.inputs, program.records, run


def _others(texts: Sequence[str]) -> dict[str, Array]:
    """The arrays that --input names. Raises BadSample."""
    from graphopt.arrays import read_arrays
    from graphopt.errors import BadSample

    given = {}
    for text in texts:
        name, _, file = text.rpartition("=")
        array = read_arrays(file)
        if not name or isinstance(array, dict):
            raise BadSample(file=text, what="is not NAME=FILE.npy")
        given[name] = array
    return given


def _numbers(option: str, text: str) -> list[float]:
    from graphopt.errors import BadOption

    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise BadOption(
            what=f"--{option} {text}", way_out="give a number, or one for each channel: 0.5,0.5,0.5"
        ) from None


def _grid(text: str | None) -> tuple[int, int] | None:
    from graphopt.errors import BadOption

    if text is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise BadOption(what=f"--grid {text}", way_out="write ROWSxCOLUMNS, such as 14x14")
    return int(found[1]), int(found[2])


def _print(console: Console, file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        console.print(f"{row['name']}: {row['kept']} of {row['tokens']} tokens", markup=False)
    console.print(f"written: {file}", markup=False)
