"""Sorting, the k largest, medians, histograms, running sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments
from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer


def _cumulative(op: Callable[..., relax.Expr]) -> Converter:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a = arguments(node, importer)
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")  # of short integers: int64
        if not shape_of(a["self"]):
            return importer.block_builder.emit(relax.op.astype(a["self"], dtype))
        return importer.block_builder.emit(op(a["self"], a["dim"], dtype))

    return convert


def _sort(node: fx.Node, importer: Importer) -> relax.Expr:
    """Values and indices; always stable, as our kernel is, whatever was asked for."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    indices = emit(relax.op.argsort(a["self"], a["dim"], a["descending"], dtype="int64"))
    return emit(relax.Tuple([emit(relax.op.gather_elements(a["self"], indices, a["dim"])), indices]))


def _argsort(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    return importer.block_builder.emit(relax.op.argsort(a["self"], a["dim"], a["descending"], dtype="int64"))


def _topk(node: fx.Node, importer: Importer) -> relax.Expr:
    """The k first in order, which serves those who ask for no order as well."""
    a = arguments(node, importer)
    best = relax.op.topk(a["self"], a["k"], a["dim"], "both", a["largest"], "int64")
    return importer.block_builder.emit(best)


def _median(node: fx.Node, importer: Importer) -> relax.Expr:
    """The lower median, with its index where an axis is given; NaN if there is one, as PyTorch has it."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    x = a["self"]
    whole = "dim" not in a
    if whole or not shape_of(x):
        x = emit(relax.op.reshape(x, (math.prod(shape_of(x)),)))
    axis = a.get("dim", 0)
    axis, n = axis % len(shape_of(x)), shape_of(x)[axis]
    order = emit(relax.op.argsort(x, axis, dtype="int64"))

    def ranked(rank: int) -> tuple[relax.Expr, relax.Expr]:
        index = emit(relax.op.strided_slice(order, [axis], [rank], [rank + 1]))
        return emit(relax.op.gather_elements(x, index, axis)), index

    value, index = ranked((n - 1) // 2)
    if "float" in dtype_of(x):
        last, at = ranked(n - 1)  # NaN comes last
        missing = emit(relax.op.isnan(last))
        value, index = emit(relax.op.where(missing, last, value)), emit(relax.op.where(missing, at, index))
    shape = tuple(node.meta["val"].shape) if whole else tuple(node.meta["val"][0].shape)
    value = emit(relax.op.reshape(value, shape))
    return value if whole else emit(relax.Tuple([value, emit(relax.op.reshape(index, shape))]))


def _histogram(node: fx.Node, importer: Importer) -> relax.Expr:
    """How many elements lie in each of `bins` equal parts of [min, max]; what lies outside does not count."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    low, high, bins = a["min"], a["max"], a["bins"]
    if low == high:
        raise ValueError("the bounds of a histogram that are those of its data")
    x = emit(relax.op.reshape(a["self"], (math.prod(shape_of(a["self"])), 1)))
    dtype = dtype_of(x)

    def const(value: float) -> relax.Expr:
        return relax.const(value, dtype)

    above = emit(relax.op.multiply(emit(relax.op.subtract(x, const(low))), const(bins)))
    place = emit(relax.op.floor(emit(relax.op.divide(above, const(high - low)))))
    place = emit(relax.op.minimum(place, const(bins - 1)))  # max itself is in the last part
    there = emit(relax.op.equal(place, relax.const(np.arange(bins).reshape(1, bins), dtype)))
    for bound, op in ((low, relax.op.greater_equal), (high, relax.op.less_equal)):
        there = emit(relax.op.logical_and(there, emit(op(x, const(bound)))))
    return emit(relax.op.sum(emit(relax.op.astype(there, dtype)), [0]))


TABLE: dict[str, Converter] = {
    "argsort.default": _argsort,
    "argsort.stable": _argsort,
    "cumprod.default": _cumulative(relax.op.cumprod),
    "cumsum.default": _cumulative(relax.op.cumsum),
    "histc.default": _histogram,
    "median.default": _median,
    "median.dim": _median,
    "sort.default": _sort,
    "sort.stable": _sort,
    "topk.default": _topk,
}
