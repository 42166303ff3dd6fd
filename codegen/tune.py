"""Time the dense and the sparse kernel of single layers where their target runs, so that choices go by what is true.

Each kernel is built as it is in the whole program: the same templates, packing and code. A convolution is timed as it
lies in a network of that layout; a linear layer whose sparse kernel wants tokens in the vector, with the transposes
around it, though next to another such layer it needs them only once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt import targets
from graphopt.codegen.channels_last import TO_FIRST, TO_LAST, channels_last
from graphopt.codegen.dataflow import Dataflow, op_of, shape_of
from graphopt.codegen.kernel_times import KernelTimes, Layer, Side
from graphopt.codegen.layout import turned
from graphopt.codegen.lower import compile_module
from graphopt.codegen.prepare import prepare, tidied
from graphopt.codegen.rebuild import rebuild
from graphopt.cost.latency_table import RUN_SECONDS, LatencyTable
from graphopt.program import Program
from graphopt.spec import TensorSpec
from graphopt.targets import toolchain
from graphopt.targets.target import Target
from graphopt.targets.timing import timing_runner

Clock = Callable[[Layer, Side], float]


@dataclass(frozen=True)
class Tuned:
    """How many kernels a program's choices depend on, how many of them were timed now, and how many have no record."""

    wanted: int
    new: int
    missing: int


def tune(
    program: Program,
    target: Target,
    table: LatencyTable,
    *,
    seconds: float,
    clock: Clock | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Time the kernels that choices for `program` depend on and that `table` has no record of; those that are estimated
    to take longest first, both of a layer one after the other.

    Args:
        program: as `compile_program` takes it.
        target: one that runs here.
        table: gets the records.
        seconds: for all of it. Nothing is started that would take longer than what is left, going by what came before.
        clock: what gives the seconds of a kernel; by default it is built and run.
        progress: hears what is timed.
    """
    end = time.monotonic() + seconds
    times = KernelTimes(target, table.records)
    prepare(program, target, times)
    kernels = times.wanted
    by_layer: dict[int, float] = {}
    for wanted in kernels.values():
        by_layer[id(wanted.layer)] = max(wanted.cycles, by_layer.get(id(wanted.layer), 0.0))
    missing = [name for name in kernels if name not in table.records]
    missing.sort(key=lambda name: -by_layer[id(kernels[name].layer)])
    timed = clock or (lambda layer, side: seconds_of(layer, side, target))
    longest, new = 0.0, 0
    for name in missing:
        start = time.monotonic()
        if start + longest > end:
            break
        progress(f"{new + 1} of {len(missing)}: {name}")
        table.note(name, timed(kernels[name].layer, kernels[name].side))
        longest, new = max(longest, time.monotonic() - start), new + 1
    return Tuned(len(kernels), new, len(missing) - new)


def seconds_of(layer: Layer, side: Side, target: Target, *, seconds: float = RUN_SECONDS) -> float:
    """What the fastest of the runs within `seconds` takes, on one thread."""
    module = alone(layer, side)
    flow = Dataflow(module["main"])
    ends = (flow.function.params[0], flow.function.body.body)
    inputs, outputs = ((TensorSpec(name, shape_of(end), "float32"),) for name, end in zip("xy", ends, strict=True))
    artefact = compile_module(_Alone("layer", inputs, outputs), module, target)
    x = np.random.default_rng(0).standard_normal(inputs[0].shape, np.float32)
    with tempfile.TemporaryDirectory(prefix="graphopt-tune-") as folder:
        toolchain.link(artefact, target, "bundle", Path(folder))
        runner = targets.open_runner(folder, artefact, target, threads=1, runner=timing_runner(target))
        try:
            return min(runner.time([x], seconds))
        finally:
            runner.close()


@dataclass(frozen=True)
class _Alone:
    """What a layer looks like from the outside."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def alone(layer: Layer, side: Side) -> IRModule:
    """A program of one layer, laid out for either kernel."""
    image = layer.call is not None
    last = image and side == "dense"
    builder = relax.BlockBuilder()
    shape = [layer.shape[axis] for axis in TO_LAST] if last else list(layer.shape)
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    weight = relax.const(np.ascontiguousarray(layer.weight), "float32")
    with builder.function("main", [x]):
        with builder.dataflow():
            value = builder.emit(relax.op.permute_dims(x, TO_FIRST)) if last else x
            if layer.call is None:
                value = builder.emit(relax.op.matmul(value, weight))
            else:
                value = builder.emit(relax.Call(layer.call.op, [value, weight], layer.call.attrs))
            value = relax.op.permute_dims(value, TO_LAST) if last else value
            result = builder.emit_output(value)
        builder.emit_func_output(result)
    module = builder.finalize()
    if last:
        module = channels_last(module)
    elif not image and side == "sparse":
        rule = turned(layer.weight)
        module = rebuild(module, lambda _, value, b: rule(value, b) if op_of(value) == "relax.matmul" else value)
    return tidied(module)
