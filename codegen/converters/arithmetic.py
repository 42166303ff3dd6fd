"""Sums, quotients and bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments, as_dtype, promised
from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer


def _reduce(op: Callable[..., relax.Expr]) -> Converter:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a = arguments(node, importer)
        axes = a["dim"] if a["dim"] != [] else None
        return importer.block_builder.emit(op(a["self"], axes, a["keepdim"]))

    return convert


def _product(node: fx.Node, importer: Importer) -> relax.Expr:
    """Short integers are widened first, as PyTorch does: their products are int64."""
    a = arguments(node, importer)
    x = as_dtype(a["self"], promised(node), importer)
    axes, kept = (a["dim"], a["keepdim"]) if "dim" in a else (None, False)
    return importer.block_builder.emit(relax.op.prod(x, axes, kept))


def _sigmoid(node: fx.Node, importer: Importer) -> relax.Expr:
    """Of integers too, whose sigmoids are floating-point numbers."""
    x = as_dtype(arguments(node, importer)["self"], promised(node), importer)
    return importer.block_builder.emit(relax.op.sigmoid(x))


def _any(node: fx.Node, importer: Importer) -> relax.Expr:
    """Whether an element is not zero. TVM's converter narrows to eight bits first, where 256 and 0.3 are zero."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    x = a["self"]
    if dtype_of(x) != "bool":
        x = emit(relax.op.not_equal(x, relax.const(0, dtype_of(x))))
    most = relax.op.max(emit(relax.op.astype(x, "int8")), a.get("dim"), a.get("keepdim", False))
    return emit(relax.op.astype(emit(most), "bool"))


def _variance(a: dict[str, Any], correction: float, importer: Importer) -> relax.Expr:
    emit = importer.block_builder.emit
    shape = shape_of(a["self"])
    axes = [d % len(shape) for d in (a["dim"] or range(len(shape)))]
    biased = emit(relax.op.variance(a["self"], axes, a["keepdim"]))
    count = math.prod(shape[d] for d in axes)
    factor = count / (count - correction) if count > correction else math.nan
    return biased if factor == 1 else emit(relax.op.multiply(biased, relax.const(factor, dtype_of(biased))))


def _var(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    return _variance(a, 1 if a["unbiased"] else 0, importer)


def _var_mean(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    variance = _variance(a, 1 if a["correction"] is None else a["correction"], importer)
    return emit(relax.Tuple([variance, emit(relax.op.mean(a["self"], a["dim"] or None, a["keepdim"]))]))


def _min_dim(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    values = emit(relax.op.min(a["self"], a["dim"], a["keepdim"]))
    return emit(relax.Tuple([values, emit(relax.op.argmin(a["self"], a["dim"], a["keepdim"]))]))


def _divide(node: fx.Node, importer: Importer) -> relax.Expr:
    """True division: of integers too, whose quotients are floating-point numbers."""
    a = arguments(node, importer)
    x, y = (as_dtype(a[name], promised(node), importer) for name in ("self", "other"))
    return importer.block_builder.emit(relax.op.divide(x, y))


def _divide_rounded(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    dtype = promised(node)
    wide = dtype if "float" in dtype else "int64" if a["rounding_mode"] == "floor" else "float64"
    x, y = (as_dtype(a[name], wide, importer) for name in ("self", "other"))
    if a["rounding_mode"] == "floor":
        return as_dtype(emit(relax.op.floor_divide(x, y)), dtype, importer)
    result = emit(relax.op.divide(x, y))
    if a["rounding_mode"] == "trunc":
        result = emit(relax.op.trunc(result))
    return as_dtype(result, dtype, importer)


def _clamp(node: fx.Node, importer: Importer) -> relax.Expr:
    """Bounds of an integer tensor stay integers: TVM's would be infinities."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    dtype = promised(node)
    x = as_dtype(a["self"], dtype, importer)
    if "float" in dtype:
        low, high = (
            value if value is not None else bound for value, bound in ((a["min"], -math.inf), (a["max"], math.inf))
        )
        return emit(relax.op.clip(x, low, high))
    for bound, op in ((a["min"], relax.op.maximum), (a["max"], relax.op.minimum)):
        if bound is not None:
            x = emit(op(x, relax.const(bound, dtype)))
    return x


def _elu(node: fx.Node, importer: Importer) -> relax.Expr:
    """elu, and selu, which is elu with a scale; TVM's converter leaves the scales out."""
    a = arguments(node, importer)
    emit, dtype = importer.block_builder.emit, promised(node)
    x = as_dtype(a["self"], dtype, importer)
    inner = emit(relax.op.multiply(x, relax.const(a["input_scale"], dtype)))
    below = emit(relax.op.subtract(emit(relax.op.exp(inner)), relax.const(1, dtype)))
    below = emit(relax.op.multiply(below, relax.const(a["scale"] * a["alpha"], dtype)))
    above = emit(relax.op.multiply(x, relax.const(a["scale"], dtype)))
    return emit(relax.op.where(emit(relax.op.greater(x, relax.const(0, dtype))), above, below))


def _no_check(node: fx.Node, importer: Importer) -> relax.Expr:
    """A check of values, as of the classes in one_hot: a kernel has nobody to raise to, so it is left out."""
    return importer.block_builder.emit(relax.Tuple([]))


TABLE: dict[str, Converter] = {
    "_assert_async.msg": _no_check,
    "amax.default": _reduce(relax.op.max),
    "amin.default": _reduce(relax.op.min),
    "any.default": _any,
    "any.dim": _any,
    "any.dims": _any,
    "clamp.default": _clamp,
    "div.Scalar": _divide,
    "div.Scalar_mode": _divide_rounded,
    "div.Tensor": _divide,
    "div.Tensor_mode": _divide_rounded,
    "elu.default": _elu,
    "min.dim": _min_dim,
    "prod.default": _product,
    "prod.dim_int": _product,
    "sigmoid.default": _sigmoid,
    "var.dim": _var,
    "var_mean.correction": _var_mean,
}
