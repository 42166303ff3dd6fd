"""graphopt compile: a model goes in, a checked bundle comes out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
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
    amount,
    input_shapes,
    user_code,
)
from graphopt.cli.sparse import print_sparse

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.pipeline import Plan, Result


def compile(
    model: Model,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="What to write: FILE.so, FILE.a or FILE.wasm with what belongs to it beside, else a bundle folder. "
            "[default: MODEL.bundle in this folder]",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", "-t", help="cpu, wasm, arm:CPU or cuda:ARCH; see `graphopt targets`.")
    ] = "cpu",
    input_shape: InputShapes = None,
    factory: Factory = None,
    name: Annotated[str | None, typer.Option("--name", help="The model's name. [default: the file's]")] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib",
            metavar="FILE.npz|MODULE:FUNCTION",
            help="Inputs to check the bundle on: arrays by name, or a function of yours that gives some.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run what was compiled and compare it with PyTorch.")
    ] = True,
    canonicalise: Annotated[
        bool, typer.Option("--canonicalise/--no-canonicalise", help="Run the lossless passes first.")
    ] = True,
    tune: Annotated[
        float | None,
        typer.Option(
            "--tune",
            metavar="SECONDS",
            help="Time the dense and the sparse kernel of layers whose weights have zeros, here, for up to so long; "
            "then pick by that instead of estimates.",
        ),
    ] = None,
    records: Annotated[
        str | None,
        typer.Option(
            "--records",
            metavar="FILE",
            help="Times that were measured before: they are used, and with --tune added to. Equal records give equal "
            "bundles.",
        ),
    ] = None,
    dump_dir: Annotated[
        str | None, typer.Option("--dump-dir", metavar="DIR", help="Write the program there after every phase.")
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
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Print for each layer whose weight has zeros what either kernel is estimated to take (and measured, "
            "with --tune or --records), and why one was picked; for each axis what was cut, why, and what that buys.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False,
    unsafe_load: UnsafeLoad = False,
    imports: Imports = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compile a model for a target, check the result against PyTorch, and write it."""
    out = Output(json, quiet, verbose)
    started = time.perf_counter()
    from graphopt.options import Options, check_output

    options = Options(
        target=target,
        output=output if output is not None else f"{Path(model).stem or 'model'}.bundle",
        model_factory=factory,
        name=name,
        calibration=calib,
        verify=verify,
        canonicalise=canonicalise,
        dump_dir=dump_dir,
        tune=tune,
        records=records,
        unsafe_load=unsafe_load,
    )
    check_output(options)  # before the seconds that importing PyTorch takes
    cut = red.shared_options(
        flops=flops, macs=macs, params=params, bytes=bytes_, latency=latency, keep=keep, criterion=criterion,
        allocation=allocation, step=round_to, include=include, exclude=exclude, compensate=compensate,
    )  # fmt: skip
    with out.working("importing PyTorch"):
        from graphopt.optimize import reduction
        from graphopt.pipeline import build, plan
        from graphopt.targets import resolve
        from graphopt.user_code import names_function

        user_code(imports, needed=bool(factory) or unsafe_load or names_function(calib or ""))
        options = replace(
            options, input_shapes=input_shapes(input_shape), reduction=reduction(tuple(passes or ()), recipe, cut)
        )
    with out.working("reading the model"):
        if dry_run:
            planned = plan(model, options, progress=out.step)
        else:
            result = build(model, options, progress=out.step)
    if dry_run:
        out.result(planned.to_json(), lambda console: _print_plan(console, planned))
        return
    seconds = time.perf_counter() - started
    times = [] if result.reduced is None or out.silent else red.estimates(result.reduced, resolve(target))
    out.result(_as_json(result, times), lambda console: _print(console, result, seconds, times, explain=explain))


def _print_plan(console: Console, planned: Plan) -> None:
    for number, step in enumerate(planned.steps, 1):
        console.print(f"{number}. {step}", markup=False)
    for missing in planned.missing:
        console.print(f"missing: {missing}", markup=False)


def _as_json(result: Result, times: Sequence[red.Times]) -> dict[str, Any]:
    data = result.bundle.manifest.to_json()
    reduced = {} if result.reduced is None else {"reduced": red.as_json(result.reduced, times)}
    return {
        **reduced,
        "output": str(result.output),
        "written": [str(path) for path in result.written],
        "bytes": sum(path.stat().st_size for path in result.written),
        **{key: data[key] for key in ("name", "target", "inputs", "outputs", "flops", "params", "verification")},
        "sparse_weights": data["sparse_weights"],
        "workspace_bytes": data["workspace_bytes"],
        "weights_bytes": data["weights_bytes"],
    }


def _print(console: Console, result: Result, seconds: float, times: Sequence[red.Times], *, explain: bool) -> None:
    manifest = result.bundle.manifest
    size = sum(path.stat().st_size for path in result.written)
    calls, templates = len(manifest.kernels), sum(kernel["template"] != "tvm" for kernel in manifest.kernels)
    lines = [
        f"{result.output}: {manifest.name} for {manifest.target['spec']}, {amount(size, 'B')}, {seconds:.1f} s",
        f"  takes     {', '.join(map(str, manifest.inputs))}",
        f"  gives     {', '.join(map(str, manifest.outputs))}",
        f"  program   {amount(manifest.flops, 'FLOPs')}, {amount(manifest.params)} parameters, "
        f"{calls} kernel {'call' if calls == 1 else 'calls'}, {templates} of them from our templates",
        f"  verified  {manifest.verification}",
    ]
    console.print("\n".join(lines), markup=False)
    if result.reduced is not None:
        red.print_outcome(console, result.reduced, times, explain=explain)
    if explain and manifest.sparse_weights:
        print_sparse(console, manifest.sparse_weights)
    elif explain:
        console.print("no layer has a weight with zeros", markup=False)
