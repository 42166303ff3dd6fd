"""Reading and writing at places that tensors name, and putting parts together."""

from __future__ import annotations

import math

import numpy as np
from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments, as_dtype, promised
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


def _scatter(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    kinds = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
    if a.get("include_self") is False or a.get("reduce", "sum") not in kinds:
        raise ValueError(f"only sums, products, minima and maxima with include_self, not {a.get('reduce')}")
    kind = kinds[a.get("reduce") or "sum"]
    scattered = relax.op.scatter_elements(a["self"], a["index"], a["src"], a["dim"], kind)
    return importer.block_builder.emit(scattered)


def _scatter_src(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    src, shape = a["src"], shape_of(a["index"])
    if shape_of(src) != shape:  # only the part that has an index is written
        axes = list(range(len(shape)))
        src = emit(relax.op.strided_slice(src, axes, [0] * len(shape), list(shape)))
    return emit(relax.op.scatter_elements(a["self"], a["index"], src, a["dim"]))


def _index_put(node: fx.Node, importer: Importer) -> relax.Expr:
    """Writes at places named by index tensors for the leading dimensions."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    indices = [emit(relax.op.astype(i, "int64")) for i in a["indices"] if i is not None]
    if a["indices"][: len(indices)].count(None):
        raise ValueError("only leading dimensions may be indexed")
    if any(dtype_of(i) == "bool" for i in a["indices"] if i is not None):
        raise ValueError("a boolean index selects a number of elements that is known only at run time")
    places = np.broadcast_shapes(*(shape_of(i) for i in indices))
    stacked = [emit(relax.op.expand_dims(emit(relax.op.broadcast_to(i, places)), len(places))) for i in indices]
    updates = emit(relax.op.broadcast_to(a["values"], (*places, *shape_of(a["self"])[len(indices) :])))
    where = emit(relax.op.concat(stacked, len(places)))
    return emit(relax.op.scatter_nd(a["self"], where, updates, "add" if a["accumulate"] else "update"))


def _index_add(node: fx.Node, importer: Importer) -> relax.Expr:
    """Slices are added at places along one dimension, which is brought to the front."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    shape = shape_of(a["self"])
    dim, x, source = a["dim"] % len(shape), a["self"], a["source"]
    if a.get("alpha", 1) != 1:
        source = emit(relax.op.multiply(source, relax.const(a["alpha"], dtype_of(source))))
    front = [dim, *(n for n in range(len(shape)) if n != dim)]
    moved = math.prod(shape[:dim]) != 1
    rows = [shape[n] for n in front]
    count = shape_of(a["index"])[0]
    if moved:
        x, source = emit(relax.op.permute_dims(x, front)), emit(relax.op.permute_dims(source, front))
    else:
        x, source = emit(relax.op.reshape(x, rows)), emit(relax.op.reshape(source, (count, *rows[1:])))
    where = emit(relax.op.reshape(emit(relax.op.astype(a["index"], "int64")), (count, 1)))
    added = emit(relax.op.scatter_nd(x, where, source, "add"))
    if moved:
        return emit(relax.op.permute_dims(added, [front.index(n) for n in range(len(shape))]))
    return emit(relax.op.reshape(added, shape))


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
    place: relax.Expr | None = None
    for dim in dims:
        index = _from_start(indices[dim], shape[dim], importer)
        if len(dims) > 1:
            index = emit(relax.op.astype(index, "int64"))
            index = emit(relax.op.maximum(index, relax.const(0, "int64")))
            index = emit(relax.op.minimum(index, relax.const(shape[dim] - 1, "int64")))
        if place is None:
            place = index
        else:
            place = emit(relax.op.add(emit(relax.op.multiply(place, relax.const(shape[dim], "int64"))), index))
    assert place is not None
    there = shape_of(place)
    before, behind = shape_of(x)[:first], shape_of(x)[after:]
    if len(dims) > 1:
        x = emit(relax.op.reshape(x, (*before, math.prod(shape[dim] for dim in dims), *behind)))
    if len(there) != 1:
        place = emit(relax.op.reshape(place, (math.prod(there),)))
    return emit(relax.op.reshape(emit(relax.op.take(x, place, first)), (*before, *there, *behind)))


def _from_start(index: relax.Expr, extent: int, importer: Importer) -> relax.Expr:
    """An index that counts from the end where it is negative, counted from the start."""
    emit, dtype = importer.block_builder.emit, dtype_of(index)
    from_end = emit(relax.op.add(index, relax.const(extent, dtype)))
    return emit(relax.op.where(emit(relax.op.less(index, relax.const(0, dtype))), from_end, index))


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
    "index_add.default": _index_add,
    "index_put.default": _index_put,
    "masked_scatter.default": _masked_scatter,
    "scatter.src": _scatter_src,
    "scatter_add.default": _scatter,
    "scatter_reduce.two": _scatter,
    "select.int": _select,
    "select_scatter.default": _select_scatter,
    "unfold.default": _unfold,
}
