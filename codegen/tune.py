"""Time the dense and the sparse kernel of single layers where their target runs, so that choices go by what is true.

Each kernel is built as it is in the whole program: the same templates, packing and code. A convolution is timed as it
lies in a network of that layout; a linear layer whose sparse kernel wants tokens in the vector, with the transposes
around it, though next to another such layer it needs them only once. Then the program as a whole is timed with what was
picked so, and with dense kernels: nothing else sees what layers do to each other.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt import targets
from graphopt.codegen.channels_last import TO_FIRST, TO_LAST, channels_last
from graphopt.codegen.dataflow import Array, Dataflow, op_of, shape_of
from graphopt.codegen.kernel_times import KernelTimes, Layer, Side, program_names
from graphopt.codegen.layout import turned
from graphopt.codegen.lower import compile_module
from graphopt.codegen.prepare import picked, prepare, tidied
from graphopt.codegen.rebuild import rebuild
from graphopt.cost.latency_table import RUN_SECONDS, LatencyTable
from graphopt.program import Program
from graphopt.spec import TensorSpec
from graphopt.targets import toolchain
from graphopt.targets.runner import Outside
from graphopt.targets.target import Target
from graphopt.targets.timing import timing_runner
from graphopt.verify import samples_of

# How long a program as a whole runs, in seconds.
PROGRAM_SECONDS = 1.0
# For the first guess of what a program takes: seconds for a layer.
_BUILD_SECONDS = 0.5


@dataclass(frozen=True, eq=False)
class Built:
    """A program that is ready to be compiled and run, and for how many seconds it shall run."""

    outside: Outside
    module: IRModule
    arrays: Sequence[Array]
    seconds: float


# What the fastest run of a program takes, in seconds, by the name of its record.
Clock = Callable[[str, Callable[[], Built]], float]


@dataclass(frozen=True)
class Tuned:
    """How many records a program's choices depend on, how many of them are new, and how many are missing."""

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
    """Time the kernels that choices for `program` depend on and that `table` has no record of: those that are estimated
    to take longest first, both of a layer one after the other; then the program.

    Args:
        program: as `compile_program` takes it.
        target: one that runs here.
        table: gets the records.
        seconds: for all of it. Nothing is started that would take longer than what is left, going by what came before.
        clock: what times a program; `run` by default.
        progress: hears what is timed.
    """
    watch = _Watch(table, time.monotonic() + seconds, clock or partial(run, target=target), progress)
    times = KernelTimes(target, table.records)
    prepare(program, target, times)
    kernels = dict(times.wanted)
    by_layer: dict[int, float] = {}
    for wanted in kernels.values():
        by_layer[id(wanted.layer)] = max(wanted.cycles, by_layer.get(id(wanted.layer), 0.0))
    order = sorted(kernels, key=lambda name: -by_layer[id(kernels[name].layer)])
    for name in order:
        watch.time(name, partial(built, kernels[name].layer, kernels[name].side), watch.longest)
    module, entries = prepare(program, target, times)
    names: tuple[str, ...] = ()
    if chosen := picked(entries):
        names = program_names(program, chosen)
        dense = KernelTimes(target, table.records, only_dense="to compare with")
        modules = (lambda: module, lambda: prepare(program, target, dense)[0])
        # Both or neither: one alone says nothing.
        guess = 2 * max(_BUILD_SECONDS, watch.longest) * max(1, len(kernels) // 2) + 2 * PROGRAM_SECONDS
        for name, make in zip(names, modules, strict=True):
            watch.time(name, partial(_whole, program, make), guess)
            guess = -math.inf if name in table.records else math.inf
    missing = sum(name not in table.records for name in (*kernels, *names))
    return Tuned(len(kernels) + len(names), watch.new, missing)


@dataclass
class _Watch:
    """Times what has no record yet, while there is time."""

    table: LatencyTable
    end: float
    clock: Clock
    progress: Callable[[str], None]
    longest: float = 0.0  # what one measurement took so far, in seconds
    new: int = 0

    def time(self, name: str, build: Callable[[], Built], guess: float) -> None:
        """Make a record, unless there is one, or it would take longer than what is left if it took `guess` seconds."""
        start = time.monotonic()
        if name in self.table.records or start + guess > self.end:
            return
        self.progress(name)
        self.table.note(name, self.clock(name, build))
        self.longest, self.new = max(self.longest, time.monotonic() - start), self.new + 1


def run(_: str, build: Callable[[], Built], *, target: Target) -> float:
    """Compile a program, and run it on one thread. What the fastest run took, in seconds."""
    made = build()
    artefact = compile_module(made.outside, made.module, target)
    with tempfile.TemporaryDirectory(prefix="graphopt-tune-") as folder:
        toolchain.link(artefact, target, "bundle", Path(folder))
        runner = targets.open_runner(folder, artefact, target, threads=1, runner=timing_runner(target))
        try:
            return min(runner.time(made.arrays, made.seconds))
        finally:
            runner.close()


@dataclass(frozen=True)
class _Outside:
    """What a layer looks like from the outside."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def built(layer: Layer, side: Side) -> Built:
    """A layer alone, on noise."""
    module = alone(layer, side)
    flow = Dataflow(module["main"])
    ends = (flow.function.params[0], flow.function.body.body)
    inputs, outputs = ((TensorSpec(name, shape_of(end), "float32"),) for name, end in zip("xy", ends, strict=True))
    x = np.random.default_rng(0).standard_normal(inputs[0].shape, np.float32)
    return Built(_Outside("layer", inputs, outputs), module, [x], RUN_SECONDS)


def _whole(program: Program, module: Callable[[], IRModule]) -> Built:
    inputs = samples_of(program)[0].inputs
    arrays = [np.asarray(inputs[spec.name]) for spec in program.inputs]
    return Built(program, module(), arrays, PROGRAM_SECONDS)


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
