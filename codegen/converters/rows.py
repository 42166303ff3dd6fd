"""Reading and writing whole rows: gather, scatter and their kin where an index is the same for all behind a dimension.

    gather(x, d, index[..., None].expand(...))         take of rows of (lead * n, inner), one place a row
    scatter_add(x, d, index[..., None].expand(...), y) scatter_nd into rows of (lead * n, inner)

An index of its own for every element stays what it is, and costs a look-up for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments, as_dtype
from graphopt.codegen.dataflow import Constant, dtype_of, op_of, shape_of
from graphopt.codegen.half import Importer

_SCATTERS = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}


def _gather(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    shape, wanted = shape_of(a["self"]), shape_of(a["index"])
    dim = a["dim"] % len(shape) if shape else 0
    index = row_index(a["index"], shape, dim, importer)
    if index is None:
        return emit(relax.op.gather_elements(a["self"], a["index"], a["dim"]))
    table = emit(relax.op.reshape(a["self"], as_rows(shape, dim)))
    return emit(relax.op.reshape(emit(relax.op.take(table, places(index, shape, dim, importer), 0)), wanted))


def _scatter(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    if a.get("include_self") is False or a.get("reduce", "sum") not in _SCATTERS:
        raise ValueError(f"only sums, products, minima and maxima with include_self, not {a.get('reduce')}")
    return _scattered(a["self"], a["dim"], a["index"], a["src"], _SCATTERS[a.get("reduce") or "sum"], importer)


def _scatter_src(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    return _scattered(a["self"], a["dim"], a["index"], a["src"], "update", importer)


def _scattered(
    x: relax.Expr, dim: int, index: relax.Expr, src: relax.Expr, kind: str, importer: Importer
) -> relax.Expr:
    emit = importer.block_builder.emit
    shape, there = shape_of(x), shape_of(index)
    dim = dim % len(shape) if shape else 0
    if shape_of(src) != there:  # only the part that has an index is written
        axes = list(range(len(there)))
        src = emit(relax.op.strided_slice(src, axes, [0] * len(there), list(there)))
    rows = row_index(index, shape, dim, importer)
    if rows is None:
        return emit(relax.op.scatter_elements(x, index, src, dim, kind))
    return into_rows(x, dim, places(rows, shape, dim, importer), src, kind, importer)


def _index_add(node: fx.Node, importer: Importer) -> relax.Expr:
    """The same places in each of the leading dimensions."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    shape = shape_of(a["self"])
    dim, source = a["dim"] % len(shape), a["source"]
    if a.get("alpha", 1) != 1:
        source = emit(relax.op.multiply(source, relax.const(a["alpha"], dtype_of(source))))
    index = a["index"]
    if math.prod(shape[:dim]) != 1:
        index = emit(relax.op.broadcast_to(index, (*shape[:dim], *shape_of(index))))
    return into_rows(a["self"], dim, places(index, shape, dim, importer), source, "add", importer)


def _index_put(node: fx.Node, importer: Importer) -> relax.Expr:
    """Writes at places named by index tensors for the leading dimensions, which are seen as one."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    indices = [as_dtype(i, "int64", importer) for i in a["indices"] if i is not None]
    if a["indices"][: len(indices)].count(None):
        raise ValueError("only leading dimensions may be indexed")
    if any(dtype_of(i) == "bool" for i in a["indices"] if i is not None):
        raise ValueError("a boolean index selects a number of elements that is known only at run time")
    shape, count = shape_of(a["self"]), len(indices)
    there = np.broadcast_shapes(*(shape_of(i) for i in indices))
    place = one_place(indices, shape[:count], importer)
    if shape_of(place) != there:
        place = emit(relax.op.broadcast_to(place, there))
    updates = emit(relax.op.broadcast_to(a["values"], (*there, *shape[count:])))
    whole = emit(relax.op.reshape(a["self"], (math.prod(shape[:count]), *shape[count:])))
    flat = emit(relax.op.reshape(place, (math.prod(there),)))
    written = into_rows(whole, 0, flat, updates, "add" if a["accumulate"] else "update", importer)
    return emit(relax.op.reshape(written, shape))


def into_rows(
    x: relax.Expr, dim: int, place: relax.Expr, source: relax.Expr, kind: str, importer: Importer
) -> relax.Expr:
    """Rows of `source` written to, or combined with, the rows of `x` at `place` (rows,), in order."""
    emit = importer.block_builder.emit
    shape = shape_of(x)
    table = emit(relax.op.reshape(x, as_rows(shape, dim)))
    (count,), width = shape_of(place), as_rows(shape, dim)[1]
    where = emit(relax.op.reshape(as_dtype(place, "int64", importer), (count, 1)))
    source = emit(relax.op.reshape(source, (count, width)))
    return emit(relax.op.reshape(emit(relax.op.scatter_nd(table, where, source, kind)), shape))


def as_rows(shape: Sequence[int], dim: int) -> tuple[int, int]:
    """Extents of a tensor as rows along `dim` and everything before it."""
    return math.prod(shape[: dim + 1]), math.prod(shape[dim + 1 :])


def row_index(index: relax.Expr, shape: Sequence[int], dim: int, importer: Importer) -> relax.Expr | None:
    """The (*lead, k) indices of whole rows, where `index` repeats them over every dimension behind `dim`; else None."""
    there = shape_of(index)
    if (*there[:dim], *there[dim + 1 :]) != (*shape[:dim], *shape[dim + 1 :]) or math.prod(shape[dim + 1 :]) == 1:
        return None
    emit = importer.block_builder.emit
    source = importer.block_builder.lookup_binding(index) if isinstance(index, relax.Var) else index
    if isinstance(source, Constant):
        known = source.value.numpy().reshape(*there[: dim + 1], -1)
        return relax.const(np.ascontiguousarray(known[..., 0])) if (known == known[..., :1]).all() else None
    if op_of(source) != "relax.broadcast_to":
        return None
    narrow = source.args[0]
    extents = (1,) * (len(there) - len(shape_of(narrow))) + shape_of(narrow)
    if math.prod(extents[dim + 1 :]) != 1:
        return None
    rows = emit(relax.op.reshape(narrow, extents[: dim + 1]))
    return rows if extents[: dim + 1] == there[: dim + 1] else emit(relax.op.broadcast_to(rows, there[: dim + 1]))


def places(index: relax.Expr, shape: Sequence[int], dim: int, importer: Importer) -> relax.Expr:
    """Numbers of the rows that (*lead, k) indices name, among all rows of all leading dimensions; flat."""
    emit = importer.block_builder.emit
    flat = (math.prod(shape_of(index)),)
    lead = math.prod(shape[:dim])
    if lead == 1:
        return emit(relax.op.reshape(index, flat))
    index = emit(relax.op.reshape(as_dtype(index, "int64", importer), (lead, flat[0] // lead)))
    first = relax.const(np.arange(lead, dtype="int64")[:, None])
    place = one_place([first, index], (lead, shape[dim]), importer)
    return emit(relax.op.reshape(place, flat))


def one_place(indices: Sequence[relax.Expr], extents: Sequence[int], importer: Importer) -> relax.Expr:
    """Indices of several dimensions as one of all of them; each counted from its end where it is negative.

    Each is clamped to its own dimension, so that one that is out of range does not reach into another row.
    """
    emit = importer.block_builder.emit
    place: relax.Expr | None = None
    for index, extent in zip(indices, extents, strict=True):
        if not _known_to_fit(index, extent):
            index = from_start(index, extent, importer)
            if len(indices) > 1:
                index = as_dtype(index, "int64", importer)
                index = emit(relax.op.maximum(index, relax.const(0, "int64")))
                index = emit(relax.op.minimum(index, relax.const(extent - 1, "int64")))
        if place is None:
            place = index
        else:
            place = emit(relax.op.add(emit(relax.op.multiply(place, relax.const(extent, "int64"))), index))
    assert place is not None
    return place


def _known_to_fit(index: relax.Expr, extent: int) -> bool:
    if not isinstance(index, Constant) or dtype_of(index) != "int64":
        return False
    known = index.value.numpy()
    return bool(((known >= 0) & (known < extent)).all())


def from_start(index: relax.Expr, extent: int, importer: Importer) -> relax.Expr:
    """An index that counts from the end where it is negative, counted from the start."""
    emit, dtype = importer.block_builder.emit, dtype_of(index)
    from_end = emit(relax.op.add(index, relax.const(extent, dtype)))
    return emit(relax.op.where(emit(relax.op.less(index, relax.const(0, dtype))), from_end, index))


TABLE: dict[str, Converter] = {
    "gather.default": _gather,
    "index_add.default": _index_add,
    "index_put.default": _index_put,
    "scatter.src": _scatter_src,
    "scatter_add.default": _scatter,
    "scatter_reduce.two": _scatter,
}
