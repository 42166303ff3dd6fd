"""Reading and writing at places that tensors name, and putting parts together."""

from __future__ import annotations

import math

import numpy as np
from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments, as_dtype, promised
from graphopt.codegen.converters.rows import one_place
from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer


def _select_scatter(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    shape = shape_of(a["self"])
    dim = a["dim"] % len(shape)
    index = a["index"] % shape[dim]
    parts = [emit(relax.op.expand_dims(a["src"], dim))]
    if index > 0:
        parts.insert(0, emit(relax.op.strided_slice(a["self"], [dim], [0], [index])))
    if index + 1 < shape[dim]:
        parts.append(emit(relax.op.strided_slice(a["self"], [dim], [index + 1], [shape[dim]])))
    return emit(relax.op.concat(parts, dim))


def _cat(node: fx.Node, importer: Importer) -> relax.Expr:
    """Side by side, in the dtype that holds them all; parts without elements do not count, whatever their rank."""
    a = arguments(node, importer)
    parts = [as_dtype(x, promised(node), importer) for x in a["tensors"] if math.prod(shape_of(x))]
    return importer.block_builder.emit(relax.op.concat(parts, a["dim"]))


def _masked_scatter(node: fx.Node, importer: Importer) -> relax.Expr:
    """The n-th place where the mask is set gets the n-th element of the source."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    x, source, shape = a["self"], a["source"], tuple(node.meta["val"].shape)
    count = math.prod(shape)
    mask = a["mask"] if shape_of(a["mask"]) == shape else emit(relax.op.broadcast_to(a["mask"], shape))
    flat = emit(relax.op.astype(emit(relax.op.reshape(mask, (count,))), "int64"))
    number = emit(relax.op.subtract(emit(relax.op.cumsum(flat, 0)), relax.const(1, "int64")))
    elements = emit(relax.op.reshape(source, (math.prod(shape_of(source)),)))
    taken = emit(relax.op.reshape(emit(relax.op.take(elements, number, 0)), shape))
    if shape_of(x) != shape:
        x = emit(relax.op.broadcast_to(x, shape))
    return emit(relax.op.where(mask, taken, x))


def _embedding(node: fx.Node, importer: Importer) -> relax.Expr:
    """Rows of a table. TVM's converter narrows indices to 32 bits, which changes those that are far out of range."""
    a = arguments(node, importer)
    return importer.block_builder.emit(relax.op.take(a["weight"], a["indices"], 0))


def _index(node: fx.Node, importer: Importer) -> relax.Expr:
    """x[i, j, ...]: one look-up along the indexed dimensions, which are brought together and seen as one.

    Each index is clamped to its own dimension, so that one that is out of range does not reach into another row.
    """
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    x, indices = a["self"], a["indices"]
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    if any(dtype_of(indices[dim]) in ("bool", "uint8") for dim in dims):
        raise ValueError("a boolean index selects a number of elements that is known only at run time")
    shape = shape_of(x)
    if not dims:
        return x
    first = dims[0]
    if dims != list(range(first, first + len(dims))):  # PyTorch puts what was looked up in front
        rest = [dim for dim in range(len(shape)) if dim not in dims]
        x, first = emit(relax.op.permute_dims(x, [*dims, *rest])), 0
    after = first + len(dims)
    place = one_place([indices[dim] for dim in dims], [shape[dim] for dim in dims], importer)
    there = shape_of(place)
    before, behind = shape_of(x)[:first], shape_of(x)[after:]
    if len(dims) > 1:
        x = emit(relax.op.reshape(x, (*before, math.prod(shape[dim] for dim in dims), *behind)))
    if len(there) != 1:
        place = emit(relax.op.reshape(place, (math.prod(there),)))
    return emit(relax.op.reshape(emit(relax.op.take(x, place, first)), (*before, *there, *behind)))


def _select(node: fx.Node, importer: Importer) -> relax.Expr:
    """One index of a dimension; a negative one counts from the end."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    shape = shape_of(a["self"])
    dim = a["dim"] % len(shape)
    at = a["index"] % shape[dim]
    return emit(relax.op.squeeze(emit(relax.op.strided_slice(a["self"], [dim], [at], [at + 1])), [dim]))


def _unfold(node: fx.Node, importer: Importer) -> relax.Expr:
    """Windows along a dimension: (..., windows, ..., size)."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    shape = shape_of(a["self"])
    dim = a["dimension"] % len(shape)
    starts = range(0, shape[dim] - a["size"] + 1, a["step"])
    rows = np.array([s + k for s in starts for k in range(a["size"])], "int64")
    taken = emit(relax.op.take(a["self"], relax.const(rows, "int64"), dim))
    windows = emit(relax.op.reshape(taken, (*shape[:dim], len(starts), a["size"], *shape[dim + 1 :])))
    axes = [d for d in range(len(shape) + 1) if d != dim + 1]
    return emit(relax.op.permute_dims(windows, [*axes, dim + 1]))


TABLE: dict[str, Converter] = {
    "cat.default": _cat,
    "embedding.default": _embedding,
    "index.Tensor": _index,
    "masked_scatter.default": _masked_scatter,
    "select.int": _select,
    "select_scatter.default": _select_scatter,
    "unfold.default": _unfold,
}
