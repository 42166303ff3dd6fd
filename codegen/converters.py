"""Operators of exported graphs that TVM's importer lacks, or takes in fewer spellings than PyTorch has.

Each takes an fx node and the importer, emits Relax, and returns the value. Arguments are read by the names in the
operator's schema, so a keyword and a position are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from torch import fx
from tvm import relax

from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer

Converter = Callable[[fx.Node, Importer], relax.Expr]


def arguments(node: fx.Node, importer: Importer) -> dict[str, Any]:
    """The call's arguments by name, defaults included, with tensors as Relax values."""
    bound = {}
    for i, formal in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = formal.default_value if formal.has_default_value() else None
        value = node.args[i] if i < len(node.args) else node.kwargs.get(formal.name, default)
        bound[formal.name] = fx.map_arg(value, lambda n: importer.env[n])
    return bound


def _attention(node: fx.Node, importer: Importer) -> relax.Expr:
    """scaled_dot_product_attention of any rank, with masks of any dtype, an explicit scale and grouped heads."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    query, key, value, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["dropout_p"]:
        raise ValueError("it drops attention at random, which is for training; capture the model in eval mode")
    lead, rows, columns = shape_of(query)[:-2], shape_of(query)[-2], shape_of(key)[-2]
    if a["enable_gqa"] and (groups := lead[-1] // shape_of(key)[-3]) > 1:
        key, value = (emit(relax.op.repeat(x, groups, axis=len(lead) - 1)) for x in (key, value))

    def four(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(batch, heads, rows, columns) of a shape of any rank."""
        *batch, heads, n, m = (1, 1, *shape)
        return math.prod(batch), heads, n, m

    def with_heads_inside(x: relax.Expr) -> relax.Expr:
        return emit(relax.op.permute_dims(emit(relax.op.reshape(x, four(shape_of(x)))), [0, 2, 1, 3]))

    q, k, v = (with_heads_inside(x) for x in (query, key, value))
    bias = None
    if mask is not None:
        dtype = dtype_of(query)
        if dtype_of(mask) == "bool":
            mask = emit(relax.op.where(mask, relax.const(0.0, dtype), relax.const(float("-inf"), dtype)))
        if len(shape_of(mask)) > 4 and math.prod(shape_of(mask)[:-3]) != 1:
            mask = emit(relax.op.broadcast_to(mask, (*lead, rows, columns)))
        mask = emit(relax.op.reshape(mask, four(shape_of(mask))))
        batch, heads = shape_of(mask)[:2]
        bias = emit(relax.op.broadcast_to(mask, (batch, heads, rows, columns)))
    causal = "TopLeft" if a["is_causal"] else None
    out = emit(relax.op.nn.attention(q, k, v, bias=bias, scale=a["scale"], causal_mask=causal))
    out = emit(relax.op.permute_dims(out, [0, 2, 1, 3]))
    return emit(relax.op.reshape(out, (*lead, rows, shape_of(value)[-1])))


def _reduce(op: Callable[..., relax.Expr]) -> Converter:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a = arguments(node, importer)
        axes = a["dim"] if a["dim"] != [] else None
        return importer.block_builder.emit(op(a["self"], axes, a["keepdim"]))

    return convert


def _any(node: fx.Node, importer: Importer) -> relax.Expr:
    emit = importer.block_builder.emit
    x = arguments(node, importer)["self"]
    return emit(relax.op.astype(emit(relax.op.max(emit(relax.op.astype(x, "int8")))), "bool"))


def _var(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    shape = shape_of(a["self"])
    axes = [d % len(shape) for d in (a["dim"] or range(len(shape)))]
    biased = emit(relax.op.variance(a["self"], axes, a["keepdim"]))
    count = math.prod(shape[d] for d in axes)
    factor = count / (count - 1) if a["unbiased"] and count > 1 else 1.0
    return emit(relax.op.multiply(biased, relax.const(factor, dtype_of(biased))))


def _min_dim(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    values = emit(relax.op.min(a["self"], a["dim"], a["keepdim"]))
    return emit(relax.Tuple([values, emit(relax.op.argmin(a["self"], a["dim"], a["keepdim"]))]))


def _pad(mode: str) -> Converter:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a = arguments(node, importer)
        width = [0] * (2 * len(shape_of(a["self"])))
        for i in range(0, len(a["padding"]), 2):  # torch counts from the last dimension, Relax from the first
            at = len(width) - 2 - i
            width[at : at + 2] = a["padding"][i : i + 2]
        return importer.block_builder.emit(relax.op.nn.pad(a["self"], width, mode))

    return convert


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


def _group_norm(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    x, weight, bias = a["input"], a["weight"], a["bias"]
    shape, dtype = shape_of(x), dtype_of(x)
    weight = relax.const(np.ones(shape[1]), dtype) if weight is None else weight
    bias = relax.const(np.zeros(shape[1]), dtype) if bias is None else bias
    norm = relax.op.nn.group_norm(
        x, weight, bias, num_groups=a["num_groups"], channel_axis=1, axes=list(range(2, len(shape))), epsilon=a["eps"]
    )
    return importer.block_builder.emit(norm)


def _divide_rounded(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    wide = dtype if "float" in dtype else "int64" if a["rounding_mode"] == "floor" else "float64"

    def widened(x: Any) -> relax.Expr:
        return emit(relax.op.astype(x, wide)) if isinstance(x, relax.Expr) else relax.const(x, wide)

    x, y = widened(a["self"]), widened(a["other"])
    if a["rounding_mode"] == "floor":
        result = relax.op.floor_divide(x, y)
    else:
        result = relax.op.divide(x, y)
        result = relax.op.trunc(emit(result)) if a["rounding_mode"] == "trunc" else result
    result = emit(result)
    return result if dtype_of(result) == dtype else emit(relax.op.astype(result, dtype))


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


def _no_check(node: fx.Node, importer: Importer) -> relax.Expr:
    """A check of values, as of the classes in one_hot: a kernel has nobody to raise to, so it is left out."""
    return importer.block_builder.emit(relax.Tuple([]))


CONVERTERS: dict[str, Converter] = {
    "_assert_async.msg": _no_check,
    "amax.default": _reduce(relax.op.max),
    "amin.default": _reduce(relax.op.min),
    "any.default": _any,
    "argsort.default": _argsort,
    "argsort.stable": _argsort,
    "cumprod.default": _cumulative(relax.op.cumprod),
    "cumsum.default": _cumulative(relax.op.cumsum),
    "div.Scalar_mode": _divide_rounded,
    "div.Tensor_mode": _divide_rounded,
    "embedding.default": _embedding,
    "group_norm.default": _group_norm,
    "index.Tensor": _index,
    "index_put.default": _index_put,
    "median.default": _median,
    "median.dim": _median,
    "min.dim": _min_dim,
    "prod.dim_int": _reduce(relax.op.prod),
    "reflection_pad1d.default": _pad("reflect"),
    "reflection_pad2d.default": _pad("reflect"),
    "reflection_pad3d.default": _pad("reflect"),
    "replication_pad1d.default": _pad("replicate"),
    "replication_pad2d.default": _pad("replicate"),
    "replication_pad3d.default": _pad("replicate"),
    "scaled_dot_product_attention.default": _attention,
    "scatter.src": _scatter_src,
    "scatter_add.default": _scatter,
    "scatter_reduce.two": _scatter,
    "select_scatter.default": _select_scatter,
    "sort.default": _sort,
    "sort.stable": _sort,
    "topk.default": _topk,
    "unfold.default": _unfold,
    "var.dim": _var,
}
