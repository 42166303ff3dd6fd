"""graphopt run: run a bundle on arrays from files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.common import Debug, Json, Output, Quiet, Threads, Verbose

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.arrays import Array
    from graphopt.bundle import Bundle


def run(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The folder that `graphopt compile` wrote.")],
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="[NAME=]FILE",
            help="An input from a .npy file, or several by name from a .npz file. Repeat for each.",
        ),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="[NAME=]FILE",
            help="Where to write: .npy for one output, .npz for all of them. Repeat with names for several.",
        ),
    ] = None,
    threads: Threads = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run a bundle on inputs from .npy or .npz files."""
    out = Output(json, quiet, verbose)
    with out.working("loading the bundle"):
        from graphopt.bundle import load

        with load(bundle, threads=threads) as loaded:
            places = _places(loaded, output or [])
            given = _read(loaded, input or [])
            out.step("running")
            results = loaded.run(given, note=out.note)
            names = [spec.name for spec in loaded.manifest.outputs]
            arrays = results if isinstance(results, dict) else {names[0]: results}
            for file, wanted in places.items():
                _write(file, wanted, arrays)
    written = sorted(map(str, places))
    described = {name: _describe(array) for name, array in arrays.items()}
    out.result({"outputs": described, "written": written}, lambda console: _print(console, described, written))


def _read(bundle: Bundle, texts: list[str]) -> dict[str, Array]:
    """The arrays that --input names. An input of the model needs no name where it is the only one."""
    from graphopt.arrays import read_arrays
    from graphopt.errors import BadSample, WrongInputs

    specs = bundle.manifest.inputs
    expected = ", ".join(map(str, specs)) or "no inputs"
    given: dict[str, Array] = {}

    def add(name: str, array: Array) -> None:
        if name in given:
            raise WrongInputs(model=bundle.name, what=f"{name} is given twice", expected=expected)
        given[name] = array

    for text in texts:
        name, _, file = text.rpartition("=")
        content = read_arrays(file)
        if not isinstance(content, dict):
            if not name and len(specs) != 1:
                what = f"--input {text} does not say which input it is"
                raise WrongInputs(model=bundle.name, what=what, expected=expected)
            add(name or specs[0].name, content)
        elif not name:
            for key, array in content.items():
                add(key, array)
        elif name in content or len(content) == 1:
            add(name, content.get(name, next(iter(content.values()))))
        else:
            raise BadSample(file=file, what=f"has no array {name}; it has {', '.join(content) or 'none'}")
    return given


def _places(bundle: Bundle, texts: list[str]) -> dict[Path, list[str]]:
    """Which outputs go to which file; all of it checked before anything runs."""
    from graphopt.errors import BadOption, CannotWrite

    names = [spec.name for spec in bundle.manifest.outputs]
    places: dict[Path, list[str]] = {}
    for text in texts:
        name, _, file = text.rpartition("=")
        path = Path(file)
        if name and name not in names:
            raise BadOption(what=f"--output {text}: no such output", way_out=f"it gives {', '.join(names)}")
        if path.suffix not in (".npy", ".npz"):
            raise BadOption(what=f"--output {text}: the suffix is {path.suffix!r}", way_out="write .npy or .npz")
        if not name and path.suffix == ".npy" and len(names) != 1:
            way_out = f"name one, as {names[0]}={file}, or write a .npz"
            raise BadOption(what=f"--output {text}: a .npy file holds one array of {len(names)}", way_out=way_out)
        if path in places:
            raise BadOption(what=f"--output {text}: the file is named twice", way_out="write a .npz for several")
        if path.is_dir() or not path.parent.is_dir():
            reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise CannotWrite(file=file, reason=reason)
        places[path] = [name] if name else names
    return places


def _write(file: Path, names: list[str], arrays: dict[str, Array]) -> None:
    import numpy as np

    from graphopt.program import write_whole

    def write(stream: Any) -> None:
        if file.suffix == ".npy":
            np.save(stream, arrays[names[0]], allow_pickle=False)
        else:
            np.savez(stream, allow_pickle=False, **{name: arrays[name] for name in names})

    write_whole(os.fspath(file), write)


def _describe(array: Array) -> dict[str, Any]:
    import numpy as np

    data: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    values = np.asarray(array, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if finite.size:
        data |= {"min": float(finite.min()), "max": float(finite.max()), "mean": float(finite.mean())}
    if finite.size < values.size:
        data["non_finite"] = int(values.size - finite.size)
    return data


def _print(console: Console, described: dict[str, dict[str, Any]], written: list[str]) -> None:
    for name, data in described.items():
        numbers = "".join(f"  {key} {data[key]:.6g}" for key in ("min", "mean", "max") if key in data)
        bad = f"  {data['non_finite']} not finite" if "non_finite" in data else ""
        console.print(f"{name}: {data['dtype']}{data['shape']}{numbers}{bad}", markup=False)
    for file in written:
        console.print(f"written: {file}", markup=False)
