"""Sort, argsort, top-k and maxima with their index, as comparisons of all with all: sums that threads share out.

    rank[o, i, c]  = how many j come before i          n^2 comparisons: 10^7 for 3000 tokens, some microseconds
    order[o, r, c] = the i whose rank is r
    of one         the least of (key, index) as one integer, of neighbours first and of all then

Keys, and with them ties, NaN and zeros, are those of `kernels/sorting.py`.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import relax, te, tirx

from graphopt.codegen.dataflow import dtype_of, op_of, shape_of
from graphopt.codegen.kernels.sorting import Order, key_of, order_of

Expr = Any
CHUNK = 32  # elements that one thread looks at where only the first is wanted


def compare_all(_: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
    """A rewrite of sorts, top-k and maxima to reductions, which have a thread mapping."""
    if op_of(value) not in ("relax.sort", "relax.argsort", "relax.topk") or not math.prod(shape_of(value.args[0])):
        return value
    x = value.args[0]
    emit = builder.emit
    order = order_of(value, shape_of(x), dtype_of(x))
    # A line that is dense has no third dimension: then threads of a block share its reduction.
    lines = emit(relax.op.reshape(x, (order.outer, order.n, *([order.inner] if order.inner > 1 else []))))
    keys = emit(builder.call_te(lambda t: _keys(t, order), lines, primfunc_name_hint="keys"))
    if order.kept == 1 and order.key == "int32":
        packed = emit(builder.call_te(_packed, keys, primfunc_name_hint="packed"))
        places = emit(builder.call_te(_first, packed, primfunc_name_hint="first"))
    else:
        ranks = emit(builder.call_te(_ranks, keys, primfunc_name_hint="ranks"))
        places = emit(builder.call_te(_places, ranks, order.kept, primfunc_name_hint="places"))
    axis = int(value.attrs.axis) % max(1, len(shape_of(x)))
    shape = (*shape_of(x)[:axis], order.kept, *shape_of(x)[axis + 1 :])
    results = []
    if order.values:
        taken = emit(builder.call_te(_taken, lines, places, primfunc_name_hint="taken"))
        results.append(emit(relax.op.reshape(taken, shape)))
    if order.indices:
        results.append(emit(relax.op.reshape(emit(relax.op.astype(places, order.indices)), shape)))
    return results[0] if len(results) == 1 else relax.Tuple(results)


def _keys(x: te.Tensor, order: Order) -> te.Tensor:
    def key(*at: Expr) -> Expr:
        element = x(*at)
        return key_of(element if str(x.dtype) == order.compared else element.astype(order.compared), order)

    return te.compute(x.shape, key, name="keys")


def _ranks(keys: te.Tensor) -> te.Tensor:
    j = te.reduce_axis((0, keys.shape[1]), name="j")

    def rank(*at: Expr) -> Expr:
        outer, i, *inner = at
        other, own = keys(outer, j, *inner), keys(*at)
        before = tirx.any(other < own, tirx.all(other == own, j < i))
        return te.sum(tirx.Select(before, tirx.const(1, "int32"), tirx.const(0, "int32")), axis=j)

    return te.compute(keys.shape, rank, name="ranks")


def _places(ranks: te.Tensor, kept: int) -> te.Tensor:
    outer, n, *inner = ranks.shape
    j = te.reduce_axis((0, n), name="j")

    def place(*at: Expr) -> Expr:
        there = ranks(at[0], j, *at[2:]) == at[1]
        return te.sum(tirx.Select(there, j.astype("int32"), tirx.const(0, "int32")), axis=j)

    return te.compute((outer, kept, *inner), place, name="places")


def _packed(keys: te.Tensor) -> te.Tensor:
    """The least (key, index) of every `CHUNK` neighbours, as one integer: a cache line for each thread."""
    outer, n, *inner = keys.shape
    j = te.reduce_axis((0, min(CHUNK, int(n))), name="j")

    def least(*at: Expr) -> Expr:
        i = tirx.min(at[1] * CHUNK + j, n - 1)  # what is met again changes nothing
        key = tirx.shift_left(keys(at[0], i, *at[2:]).astype("int64"), tirx.const(32, "int64"))
        return te.min(key + i.astype("int64"), axis=j)

    return te.compute((outer, -(-int(n) // CHUNK), *inner), least, name="packed")


def _first(packed: te.Tensor) -> te.Tensor:
    outer, chunks, *inner = packed.shape
    low = tirx.const(2**32 - 1, "int64")
    if int(chunks) == 1:  # a reduction of one is inlined into what follows, its first value with it
        return te.compute(packed.shape, lambda *at: tirx.bitwise_and(packed(*at), low).astype("int32"), name="first")
    j = te.reduce_axis((0, chunks), name="j")
    best = te.compute((outer, 1, *inner), lambda *at: te.min(packed(at[0], j, *at[2:]), axis=j), name="best")
    return te.compute(best.shape, lambda *at: tirx.bitwise_and(best(*at), low).astype("int32"), name="first")


def _taken(x: te.Tensor, places: te.Tensor) -> te.Tensor:
    return te.compute(places.shape, lambda *at: x(at[0], places(*at), *at[2:]), name="taken")
