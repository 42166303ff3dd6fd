"""Reading and writing at places that tensors name."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments
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


def _embedding(node: fx.Node, importer: Importer) -> relax.Expr:
    """Rows of a table. TVM's converter narrows indices to 32 bits, which changes those that are far out of range."""
    a = arguments(node, importer)
    return importer.block_builder.emit(relax.op.take(a["weight"], a["indices"], 0))


def _index(node: fx.Node, importer: Importer) -> relax.Expr:
    """x[i, j, ...]: TVM's converter, with indices that count from the end brought to what it takes."""
    emit = importer.block_builder.emit
    source, indices = cast("tuple[fx.Node, list[fx.Node | None]]", node.args[:2])
    extents = shape_of(importer.env[source])
    before = {index: importer.env[index] for index in indices if index is not None}
    for index, extent in zip(indices, extents, strict=False):
        if index is not None and dtype_of(before[index]) != "bool":
            value = before[index]
            from_end = emit(relax.op.add(value, relax.const(extent, dtype_of(value))))
            negative = emit(relax.op.less(value, relax.const(0, dtype_of(value))))
            importer.env[index] = emit(relax.op.where(negative, from_end, value))
    try:
        return importer._index_tensor(node)
    finally:
        importer.env.update(before)


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
    "embedding.default": _embedding,
    "index.Tensor": _index,
    "index_put.default": _index_put,
    "scatter.src": _scatter_src,
    "scatter_add.default": _scatter,
    "scatter_reduce.two": _scatter,
    "select.int": _select,
    "select_scatter.default": _select_scatter,
    "unfold.default": _unfold,
}
