"""Which way tensors lie: with channels and features innermost, or outermost where that lets zeros save time.

Dense kernels want channels innermost (`channels_last.py`). Sparse ones want them outermost, pixels or tokens in the
vector (`kernels/spmm.py`). Images are laid out one way in the whole program, whichever the estimates say is faster;
so a network never changes layout inside. A linear layer is turned on its own, into

    x [.., k] -> permute [k, tokens] -> matmul(W [n, k], .) [n, tokens] -> permute [.., n]

and `simplify_views` takes out the transposes between layers that both were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.channels_last import channels_last
from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.spmm import Source, convolution, plan_of
from graphopt.codegen.rebuild import rebuild
from graphopt.cost.register_tile import best_tile, cycles
from graphopt.sparsity import LEAST_ZEROS
from graphopt.targets.target import Target

# An estimate must be better by this much before a layout is changed for it.
GAIN = 0.95
# Elements per cycle that a transpose moves.
TRANSPOSED_PER_CYCLE = 2.0


@dataclass(frozen=True)
class Times:
    """Estimates for one layer, in cycles."""

    dense: float
    sparse: float


def lay_out(module: IRModule, target: Target) -> IRModule:
    """Choose the layout of images, and turn the linear layers whose zeros pay."""
    flow = Dataflow(module["main"])
    images = [t for b in flow.bindings if (t := _image_times(flow, b.value, target)) is not None]
    if not images or sum(t.sparse for t in images) > GAIN * sum(t.dense for t in images):
        module = channels_last(module)
        flow = Dataflow(module["main"])

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        weight = _linear(flow, value)
        if weight is None:
            return value
        times = linear_times(weight, math.prod(shape_of(value)[:-1]), target)
        if times.sparse > GAIN * times.dense:
            return value
        return _turned(value, weight, builder)

    return rebuild(module, rewrite)


def linear_times(weight: Array, tokens: int, target: Target) -> Times:
    """Estimates for a linear layer with `weight` (inputs, outputs)."""
    inputs, outputs = weight.shape
    moved = (inputs + outputs) * tokens / TRANSPOSED_PER_CYCLE if tokens > 1 else 0.0
    source = Source(1, inputs, inputs * tokens, 1, tokens, None)
    return Times(_dense(tokens, outputs, inputs, target), plan_of(weight.T, source, target).cycles + moved)


def _dense(rows: int, columns: int, steps: int, target: Target) -> float:
    return steps * cycles(rows, columns, best_tile(rows, columns, target.isa), target.isa)


def _image_times(flow: Dataflow, value: relax.Expr, target: Target) -> Times | None:
    """Estimates for a convolution; None for anything else, and where its zeros are none."""
    if op_of(value) != "relax.nn.conv2d":
        return None
    weight = flow.constant(value.args[1])
    if weight is None:
        return None
    groups = int(value.attrs.groups)
    batch, outputs, *size = shape_of(value)
    pixels = batch * math.prod(size)
    if groups == shape_of(value.args[0])[1] and weight.shape[1] == 1:
        taps = math.prod(weight.shape[2:]) * pixels * outputs / target.isa.lanes() / target.isa.fma_per_cycle
        return Times(taps * 1.5, taps * 2.0)
    found = convolution(flow, value, target)
    dense = groups * _dense(pixels, outputs // groups, math.prod(weight.shape[1:]), target)
    if isinstance(found, str):
        return Times(dense, math.inf)
    matrix, _, _, source = found
    return Times(dense, plan_of(matrix, source, target).cycles)


def _linear(flow: Dataflow, value: relax.Expr) -> Array | None:
    """The constant matrix (inputs, outputs) with zeros that run-time rows are multiplied with."""
    if op_of(value) != "relax.matmul":
        return None
    x, weight = value.args[0], flow.constant(value.args[1])
    if weight is None or weight.ndim != 2 or str(weight.dtype) != "float32" or dtype_of(x) != "float32":
        return None
    if len(shape_of(x)) < 2 or 0 in (*shape_of(x), *weight.shape) or flow.constant(x) is not None:
        return None
    return weight if 1 - np.count_nonzero(weight) / weight.size >= LEAST_ZEROS else None


def _turned(value: relax.Call, weight: Array, builder: relax.BlockBuilder) -> relax.Expr:
    x, shape, inputs = value.args[0], shape_of(value), weight.shape[0]
    # The rank stays where it can: only then do `simplify_views` and the epilogue see through the transposes.
    tokens = math.prod(shape[:-1])
    kept = len(shape) if math.prod(shape[:-2]) == 1 and len(shape) <= 3 else 2
    if kept != len(shape):
        x = builder.emit(relax.op.reshape(x, (tokens, inputs)))
    order = [*range(kept - 2), kept - 1, kept - 2]
    columns = builder.emit(relax.op.permute_dims(x, order))
    turned = builder.emit(relax.op.matmul(relax.const(np.ascontiguousarray(weight.T), "float32"), columns))
    back = relax.op.permute_dims(turned, order)
    return back if kept == len(shape) else relax.op.reshape(builder.emit(back), shape)
