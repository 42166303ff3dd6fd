"""Operators that can be computed before a transpose instead of after it, with their axes renamed.

permute NHWC -> NCHW, mean over (2, 3)            ->   mean over (1, 2)
permute both, concatenate along 1                 ->   concatenate along 3, permute
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import relax

from graphopt.codegen.dataflow import Constant, dtype_of, is_tensor, op_of, shape_of

ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in (
        *("abs", "add", "astype", "ceil", "clip", "cos", "divide", "erf", "exp"),
        *("floor", "floor_divide", "log", "maximum", "minimum", "multiply", "negative", "power", "round"),
        *("rsqrt", "sigmoid", "sin", "sqrt", "square", "subtract", "tanh", "nn.gelu", "nn.gelu_tanh"),
        *("nn.leakyrelu", "nn.relu", "nn.silu"),
    )
)


@dataclass(frozen=True)
class Transposed:
    """A tensor as a transpose of another one: its dimension i is dimension `order[i]` of `root`."""

    root: relax.Expr
    order: tuple[int, ...]


# From a tensor to the same tensor with the root's order of dimensions.
Reorder = Callable[[relax.Expr], relax.Expr]
Emit = Callable[[relax.Expr], relax.Expr]


def sink(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
    """Compute the operator in the root's order.

    Args:
        call: an operator with at least one argument that is a transpose.
        seen: that argument.
        reorder: brings any other tensor of the same rank into the root's order.
        emit: binds an expression.

    Returns:
        The result as a transpose of the new operator's result; None for an operator that has no rule here.
    """
    op = op_of(call)
    if op in ELEMENTWISE:
        return _elementwise(call, seen, reorder, emit)
    rule = RULES.get(op)
    return rule(call, seen, reorder, emit) if rule else None


def _elementwise(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
    rank = len(seen.order)
    args = []
    for arg in call.args:
        if not is_tensor(arg):
            args.append(arg)
        elif len(shape_of(arg)) <= rank:
            args.append(reorder(_with_rank(arg, rank, emit)))
        else:
            return None
    return Transposed(emit(relax.Call(call.op, args, call.attrs, call.ty_args)), seen.order)


def _with_rank(arg: relax.Expr, rank: int, emit: Emit) -> relax.Expr:
    """The tensor with leading extents of one, as broadcasting reads it; scalars stay scalars."""
    shape = shape_of(arg)
    if isinstance(arg, Constant) and math.prod(shape) == 1:
        return relax.const(arg.value.numpy().reshape(()), dtype_of(arg))
    if len(shape) == rank:
        return arg
    shape = (1,) * (rank - len(shape)) + shape
    if isinstance(arg, Constant):
        return relax.const(np.reshape(arg.value.numpy(), shape), dtype_of(arg))
    return emit(relax.op.reshape(arg, shape))


def _concat(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
    fields = [reorder(field) for field in call.args[0].fields]
    return Transposed(emit(relax.op.concat(fields, _axis(call.attrs.axis, seen))), seen.order)


def _axis(axis: object, seen: Transposed) -> int:
    return seen.order[int(axis) % len(seen.order)]  # type: ignore[call-overload]


def _reduce(op: Callable[..., relax.Expr]) -> Callable[..., Transposed | None]:
    def rule(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
        if call.attrs.axis is None:
            return None
        axes = [_axis(a, seen) for a in call.attrs.axis]
        keepdims = bool(call.attrs.keepdims)
        reduced = emit(op(reorder(call.args[0]), axes, keepdims))
        if keepdims:
            return Transposed(reduced, seen.order)
        kept = [d for d in seen.order if d not in axes]
        return Transposed(reduced, tuple(sorted(kept).index(d) for d in kept))

    return rule


def _along(op: Callable[..., relax.Expr]) -> Callable[..., Transposed | None]:
    def rule(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
        return Transposed(emit(op(reorder(call.args[0]), _axis(call.attrs.axis, seen))), seen.order)

    return rule


def _pad(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
    width = [int(w) for w in call.attrs.pad_width]
    moved = [0] * len(width)
    for dim, to in enumerate(seen.order):
        moved[2 * to : 2 * to + 2] = width[2 * dim : 2 * dim + 2]
    padded = relax.op.nn.pad(reorder(call.args[0]), moved, call.attrs.pad_mode, float(call.attrs.pad_value))
    return Transposed(emit(padded), seen.order)


def _strided_slice(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
    axes, *bounds = ([int(v) for v in arg.fields] for arg in call.args[1:])
    sliced = relax.op.strided_slice(reorder(call.args[0]), [_axis(a, seen) for a in axes], *bounds)
    return Transposed(emit(sliced), seen.order)


def _layer_norm(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
    a = call.attrs
    if len(a.axes) != 1:
        return None
    axis = _axis(a.axes[0], seen)
    if axis != len(seen.order) - 2:
        return None  # no kernel has its features there
    norm = relax.op.nn.layer_norm(
        reorder(call.args[0]),
        *call.args[1:],
        axes=[axis],
        epsilon=float(a.epsilon),
        center=bool(a.center),
        scale=bool(a.scale),
    )
    return Transposed(emit(norm), seen.order)


def _group_norm(call: relax.Call, seen: Transposed, reorder: Reorder, emit: Emit) -> Transposed | None:
    a = call.attrs
    norm = relax.op.nn.group_norm(
        reorder(call.args[0]),
        *call.args[1:],
        num_groups=int(a.num_groups),
        channel_axis=_axis(a.channel_axis, seen),
        axes=sorted(_axis(axis, seen) for axis in a.axes),
        epsilon=float(a.epsilon),
        center=bool(a.center),
        scale=bool(a.scale),
    )
    return Transposed(emit(norm), seen.order)


RULES: dict[str, Callable[..., Transposed | None]] = {
    "relax.concat": _concat,
    "relax.mean": _reduce(relax.op.mean),
    "relax.sum": _reduce(relax.op.sum),
    "relax.max": _reduce(relax.op.max),
    "relax.min": _reduce(relax.op.min),
    "relax.nn.softmax": _along(relax.op.nn.softmax),
    "relax.nn.log_softmax": _along(relax.op.nn.log_softmax),
    "relax.nn.pad": _pad,
    "relax.nn.group_norm": _group_norm,
    "relax.nn.layer_norm": _layer_norm,
    "relax.strided_slice": _strided_slice,
}
