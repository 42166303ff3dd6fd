"""Convolutions, poolings and resizings in NHWC: channels innermost.

A pixel's channels fill vectors, and a 1x1 convolution is a matrix product as it lies in memory. Each operator is
rewritten alone, between two transposes; `simplify_views` then moves the transposes out of the way of everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.rebuild import rebuild

TO_LAST = [0, 2, 3, 1]
TO_FIRST = [0, 3, 1, 2]

Emit = Callable[[relax.Expr], relax.Expr]


def channels_last(module: IRModule) -> IRModule:
    """Rewrite every operator on images that is in NCHW."""
    flow = Dataflow(module["main"])

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        rule = RULES.get(op_of(value))
        new = rule(value, builder.emit, flow) if rule else None
        return value if new is None else new

    return rebuild(module, rewrite)


def _last(x: relax.Expr, emit: Emit) -> relax.Expr:
    return emit(relax.op.permute_dims(x, TO_LAST))


def _first(x: relax.Expr, emit: Emit) -> relax.Expr:
    return emit(relax.op.permute_dims(emit(x), TO_FIRST))


def _ints(values: object) -> list[int]:
    return [int(v) for v in values]  # type: ignore[attr-defined]


def _conv2d(call: relax.Call, emit: Emit, flow: Dataflow) -> relax.Expr | None:
    a = call.attrs
    weight = flow.constant(call.args[1])
    if (a.data_layout, a.kernel_layout, a.out_layout) != ("NCHW", "OIHW", "NCHW") or weight is None:
        return None
    conv = relax.op.nn.conv2d(
        _last(call.args[0], emit),
        relax.const(np.ascontiguousarray(weight.transpose(0, 2, 3, 1)), dtype_of(call)),
        strides=_ints(a.strides),
        padding=_ints(a.padding),
        dilation=_ints(a.dilation),
        groups=int(a.groups),
        data_layout="NHWC",
        kernel_layout="OHWI",
        out_dtype=dtype_of(call),
    )
    return _first(conv, emit)


def _conv2d_transpose(call: relax.Call, emit: Emit, flow: Dataflow) -> relax.Expr | None:
    """Where the kernel is as large as the stride no outputs overlap: a matrix product, its rows laid out as tiles."""
    a = call.attrs
    weight = flow.constant(call.args[1])
    plain = not any(_ints(a.padding)) and not any(_ints(a.output_padding)) and int(a.groups) == 1
    if weight is None or a.data_layout != "NCHW" or a.kernel_layout != "IOHW" or not plain:
        return None
    c, o, kh, kw = weight.shape
    if [kh, kw] != _ints(a.strides) or _ints(a.dilation) != [1, 1]:
        return None
    n, _, h, w = shape_of(call.args[0])
    rows = relax.const(np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).reshape(c, kh * kw * o), dtype_of(call))
    tiles = emit(relax.op.matmul(_last(call.args[0], emit), rows))
    tiles = emit(relax.op.reshape(tiles, (n, h, w, kh, kw, o)))
    tiles = emit(relax.op.permute_dims(tiles, [0, 5, 1, 3, 2, 4]))
    return relax.op.reshape(tiles, shape_of(call))


def _pool(op: Callable[..., relax.Expr]) -> Callable[[relax.Call, Emit, Dataflow], relax.Expr | None]:
    def rule(call: relax.Call, emit: Emit, _: Dataflow) -> relax.Expr | None:
        a = call.attrs
        if a.layout != "NCHW":
            return None
        pooled = op(
            _last(call.args[0], emit),
            pool_size=_ints(a.pool_size),
            strides=_ints(a.strides),
            padding=_ints(a.padding),
            dilation=_ints(a.dilation),
            ceil_mode=bool(a.ceil_mode),
            count_include_pad=bool(a.count_include_pad),
            layout="NHWC",
        )
        return _first(pooled, emit)

    return rule


def _adaptive_avg_pool2d(call: relax.Call, emit: Emit, _: Dataflow) -> relax.Expr | None:
    if call.attrs.layout != "NCHW":
        return None
    size = shape_of(call)[2:]
    if size == (1, 1):
        return relax.op.mean(call.args[0], axis=[2, 3], keepdims=True)
    return _first(relax.op.nn.adaptive_avg_pool2d(_last(call.args[0], emit), size, layout="NHWC"), emit)


def _resize2d(call: relax.Call, emit: Emit, _: Dataflow) -> relax.Expr | None:
    a = call.attrs
    if a.layout != "NCHW":
        return None
    resized = relax.op.image.resize2d(
        _last(call.args[0], emit),
        call.args[1],
        roi=tuple(float(v) for v in a.roi),
        layout="NHWC",
        method=a.method,
        coordinate_transformation_mode=a.coordinate_transformation_mode,
        rounding_method=a.rounding_method,
        cubic_alpha=float(a.cubic_alpha),
        cubic_exclude=int(a.cubic_exclude),
        extrapolation_value=float(a.extrapolation_value),
    )
    return _first(resized, emit)


RULES: dict[str, Callable[[relax.Call, Emit, Dataflow], relax.Expr | None]] = {
    "relax.nn.conv2d": _conv2d,
    "relax.nn.conv2d_transpose": _conv2d_transpose,
    "relax.nn.max_pool2d": _pool(relax.op.nn.max_pool2d),
    "relax.nn.avg_pool2d": _pool(relax.op.nn.avg_pool2d),
    "relax.nn.adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "relax.image.resize2d": _resize2d,
}
