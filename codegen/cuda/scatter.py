"""Scatter without atomics, so that results do not depend on the order in which threads run.

    rows      first[r] = the least i with I[i] = r;   next[i] = the least i' > i with I[i'] = I[i]
              a block for each row follows its list and combines, a thread for each column
    replaced  last[r] = the greatest i with I[i] = r;   Y[r, :] = S[last[r], :] or X[r, :]
    elements  Y[o, r, c] = X[o, r, c] combined with every S[o, j, c] whose I[o, j, c] = r, one thread's loop

Duplicates are combined in their order, as PyTorch does it on CPUs. An index out of range names the nearest row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import relax, te, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.cuda.schedule import THREADS
from graphopt.codegen.dataflow import dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import load, prim_func, store
from graphopt.codegen.kernels.scatter_rows import COMBINE, Write

Expr = Any
_REDUCERS: dict[str, Callable[..., Expr]] = {"add": te.sum, "max": te.max, "min": te.min}


def scatter_in_order(_: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
    """A rewrite of scatter_nd of rows and of scatter_elements, which TVM lowers to loops without a thread mapping."""
    op = op_of(value)
    if op == "relax.scatter_nd" and shape_of(value.args[1])[-1] == 1:
        return _rows(value, builder)
    if op == "relax.scatter_elements":
        return _elements(value, builder)
    return value


def _rows(call: relax.Call, builder: relax.BlockBuilder) -> relax.Expr:
    emit = builder.emit
    x, index, source = call.args
    shape, kind = shape_of(x), str(call.attrs.reduction)
    rows, width, count = shape[0], math.prod(shape[1:]), math.prod(shape_of(index))
    index = emit(relax.op.reshape(index, (count,)))
    index = emit(builder.call_te(_clamped, index, rows, primfunc_name_hint="rows"))
    flat = [emit(relax.op.reshape(t, (n, width))) for t, n in ((x, rows), (source, count))]
    if kind == "update":
        last = emit(builder.call_te(_last, index, rows, primfunc_name_hint="last"))
        written = emit(builder.call_te(_replaced, *flat, last, primfunc_name_hint="replaced"))
        return relax.op.reshape(written, shape)
    first = emit(builder.call_te(_first, index, rows, primfunc_name_hint="first"))
    after = emit(builder.call_te(_next, index, primfunc_name_hint="next"))
    write = Write(rows, width, count, dtype_of(x), kind, from_zero=False)
    name = builder.add_func(_combined(write).without_attr("global_symbol"), f"scatter_{kind}")
    flat = [emit(relax.op.reshape(t, (math.prod(shape_of(t)),))) for t in flat]
    written = emit(relax.call_tir(name, [*flat, first, after], relax.TensorType((rows * width,), write.dtype)))
    return relax.op.reshape(written, shape)


def _clamped(index: te.Tensor, rows: int) -> te.Tensor:
    def nearest(i: Expr) -> Expr:
        last, zero = (tirx.const(n, str(index.dtype)) for n in (rows - 1, 0))
        return tirx.max(tirx.min(index[i], last), zero).astype("int32")

    return te.compute(index.shape, nearest, name="rows")


def _first(index: te.Tensor, rows: int) -> te.Tensor:
    (count,) = index.shape
    i = te.reduce_axis((0, count), name="i")
    none = tirx.const(int(count), "int32")
    return te.compute(
        (rows,), lambda r: te.min(tirx.Select(index[i] == r, i.astype("int32"), none), axis=i), name="first"
    )


def _next(index: te.Tensor) -> te.Tensor:
    (count,) = index.shape
    i = te.reduce_axis((0, count), name="i")
    none = tirx.const(int(count), "int32")

    def later(j: Expr) -> Expr:
        return te.min(tirx.Select(tirx.all(index[i] == index[j], i > j), i.astype("int32"), none), axis=i)

    return te.compute((count,), later, name="next")


def _last(index: te.Tensor, rows: int) -> te.Tensor:
    (count,) = index.shape
    i = te.reduce_axis((0, count), name="i")
    none = tirx.const(-1, "int32")
    return te.compute(
        (rows,), lambda r: te.max(tirx.Select(index[i] == r, i.astype("int32"), none), axis=i), name="last"
    )


def _replaced(x: te.Tensor, source: te.Tensor, last: te.Tensor) -> te.Tensor:
    def element(r: Expr, c: Expr) -> Expr:
        return tirx.if_then_else(last[r] >= 0, source[tirx.max(last[r], 0), c], x[r, c])

    return te.compute(x.shape, element, name="replaced")


def _combined(write: Write) -> PrimFunc:
    """The kernel: x, source, first, next, y; a block a row."""
    w = write
    threads = min(THREADS, -(-w.width // 32) * 32)
    cells, rows = w.rows * w.width, w.count * w.width
    buffers = [("x", cells, w.dtype), ("source", rows, w.dtype), ("first", w.rows, "int32"), ("next", w.count, "int32")]

    def body(x: Any, source: Any, first: Any, after: Any, y: Any) -> None:
        row_of = T.thread_binding(0, w.rows, thread="blockIdx.x")
        thread_of = T.thread_binding(0, threads, thread="threadIdx.x")
        with row_of as row, thread_of as thread, T.serial(0, -(-w.width // threads)) as i, T.sblock("row"):
            held = T.sblock_alloc_buffer((1,), w.held, scope="local")
            place = T.sblock_alloc_buffer((1,), "int32", scope="local")
            column = T.bind(i * threads + thread)
            with T.If(column < w.width), T.Then():
                store(held, 0, load(x, row * w.width + column, 1, w.held), 1, w.held)
                T.buffer_store(place, first[row], [0])
                with T.While(place[0] < w.count):
                    value = load(source, place[0] * w.width + column, 1, w.held)
                    store(held, 0, COMBINE[w.kind](held[0], value), 1, w.held)
                    T.buffer_store(place, after[place[0]], [0])
                store(y, row * w.width + column, held[0], 1, w.held)

    return prim_func([*buffers, ("y", cells, w.dtype)], body)


def _elements(call: relax.Call, builder: relax.BlockBuilder) -> relax.Expr:
    x, index, source = call.args
    shape, there, kind = shape_of(x), shape_of(index), str(call.attrs.reduction)
    axis = int(call.attrs.axis) % len(shape)
    if (*there[:axis], *there[axis + 1 :]) != (*shape[:axis], *shape[axis + 1 :]) or kind not in (*_REDUCERS, "update"):
        return call
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    flat = [builder.emit(relax.op.reshape(t, (outer, shape_of(t)[axis], inner))) for t in (x, index, source)]
    if kind == "update":
        last = builder.emit(builder.call_te(_last_element, flat[1], shape[axis], primfunc_name_hint="last"))
        written = builder.call_te(_replaced_elements, flat[0], flat[2], last, primfunc_name_hint="replaced")
    else:
        gathered = builder.call_te(_met, *flat, kind, primfunc_name_hint=f"scattered_{kind}")
        written = builder.call_te(_with, flat[0], builder.emit(gathered), kind, primfunc_name_hint=kind)
    return relax.op.reshape(builder.emit(written), shape)


def _met(x: te.Tensor, index: te.Tensor, source: te.Tensor, kind: str) -> te.Tensor:
    """What all elements that go to a place come to."""
    j = te.reduce_axis((0, index.shape[1]), name="j")
    dtype = str(source.dtype)
    none = {
        "add": lambda: tirx.const(0, dtype),
        "max": lambda: tirx.min_value(dtype),
        "min": lambda: tirx.max_value(dtype),
    }

    def element(o: Expr, r: Expr, c: Expr) -> Expr:
        return _REDUCERS[kind](tirx.Select(index[o, j, c] == r, source[o, j, c], none[kind]()), axis=j)

    return te.compute(x.shape, element, name="met")


def _with(x: te.Tensor, met: te.Tensor, kind: str) -> te.Tensor:
    return te.compute(x.shape, lambda *at: COMBINE[kind](x(*at), met(*at)), name="combined")


def _last_element(index: te.Tensor, n: int) -> te.Tensor:
    outer, count, inner = index.shape
    j = te.reduce_axis((0, count), name="j")
    none = tirx.const(-1, "int32")

    def element(o: Expr, r: Expr, c: Expr) -> Expr:
        return te.max(tirx.Select(index[o, j, c] == r, j.astype("int32"), none), axis=j)

    return te.compute((outer, n, inner), element, name="last")


def _replaced_elements(x: te.Tensor, source: te.Tensor, last: te.Tensor) -> te.Tensor:
    def element(o: Expr, r: Expr, c: Expr) -> Expr:
        there = source[o, tirx.max(last[o, r, c], 0), c]
        return tirx.if_then_else(last[o, r, c] >= 0, there, x[o, r, c])

    return te.compute(x.shape, element, name="replaced")
