"""The greatest element of every row and where it is first, as max over the last axis has it.

    Y[r] = max_c X[r, c],   I[r] = the least c with X[r, c] = Y[r]
    X  (rows, n) float32, dense; NaN is greater than everything, so that the first one wins
    limit: memory; 6 operations a vector

Every lane keeps the best element that it has seen and its column, and gives neither up for an equal one. At the end
lanes are compared as integers of 64 bits: an order-preserving key above, the column below, the least is the best.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, shape_of
from graphopt.codegen.kernels.emit import load, loop, prim_func, splat, store
from graphopt.codegen.kernels.rows import ACCUMULATORS, PARALLEL_ELEMENTS
from graphopt.codegen.kernels.sorting import Order, key_of
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target

Expr = Any


class RowMax(Template):
    """max over the last axis, with its index; see the module."""

    name: ClassVar[str] = "row-max"
    anchors: ClassVar[tuple[str, ...]] = ("relax.topk",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take the greatest one of each row of float32."""
        x = binding.value.args[0]
        refusal = not_a_row_max(binding.value)
        if refusal:
            return Decline(binding.var.name, refusal)
        n = shape_of(x)[-1]
        rows = math.prod(shape_of(x)) // n
        return KernelCall(
            name=f"f32_row_max_{n}__{target.isa.name}".replace("-", "_"),
            key=("row-max", rows, n, target.spec),
            kernel=build(rows, n, target),
            output=binding.var,
            covers=(binding.var,),
            inputs=(x,),
        )


def not_a_row_max(call: relax.Call) -> str:
    """Why a relax.topk is none; empty where it is one."""
    x, attrs = call.args[0], call.attrs
    shape = shape_of(x)
    if dtype_of(x) != "float32" or not math.prod(shape):
        return f"the maximum of {shape} in {dtype_of(x)}"
    if int(attrs.k) != 1 or not attrs.largest or str(attrs.ret_type) != "both":
        return f"more than a maximum and its index: the {attrs.k} first"
    if not shape or int(attrs.axis) % len(shape) != len(shape) - 1:
        return f"a maximum over axis {attrs.axis} of {len(shape)}, which is not the last"
    return ""


class Best:
    """The best elements so far, lane by lane, in two buffers."""

    def __init__(self, values: Any, places: Any, lanes: int) -> None:
        """Args: values, places: float32 and int32."""
        self.values, self.places, self.lanes = values, places, lanes

    def clear(self, at: Expr, first: Expr = 0) -> None:
        """Nothing seen, at `at`: -inf in the columns from `first` on, which a row of -inf is left with."""
        store(self.values, at, splat(-math.inf, self.lanes, "float32"), self.lanes, "float32")
        store(self.places, at, _columns(first, self.lanes), self.lanes, "int32")

    def meet(self, at: Expr, value: Expr, column: Expr) -> None:
        """A vector of elements from `column` on."""
        new, old = T.bind(value), T.bind(load(self.values, at, self.lanes, "float32"))
        place = T.bind(load(self.places, at, self.lanes, "int32"))

        def better(a: Expr, b: Expr) -> Expr:
            return tirx.Select(tirx.isnan(old), b, tirx.Select(new <= old, b, a))

        store(self.places, at, better(_columns(column, self.lanes), place), self.lanes, "int32")
        store(self.values, at, better(new, old), self.lanes, "float32")

    def settle(self, at: Expr, count: int, value: Any, index: Any, row: Expr) -> None:
        """Write the best of `count` vectors at `at` as the result of a row."""
        ranks = T.sblock_alloc_buffer((self.lanes,), "int64", scope="global")
        for i in range(count):
            start = at + i * self.lanes
            key = key_of(load(self.values, start, self.lanes, "float32"), _FIRST, self.lanes)
            rank = tirx.shift_left(_wide(key, self.lanes), splat(32, self.lanes, "int64"))
            rank = T.bind(rank + _wide(load(self.places, start, self.lanes, "int32"), self.lanes))
            if i:
                rank = tirx.min(load(ranks, 0, self.lanes, "int64"), rank)
            store(ranks, 0, rank, self.lanes, "int64")
        parts = [ranks[lane] for lane in range(self.lanes)]
        while len(parts) > 1:
            parts = [T.bind(tirx.min(a, b)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        best = T.bind(parts[0])
        T.buffer_store(index, tirx.bitwise_and(best, tirx.const(2**32 - 1, "int64")), [row])
        T.buffer_store(value, _value_of(T.bind(tirx.shift_right(best, tirx.const(32, "int64")))), [row])


_FIRST = Order(1, 1, 1, "float32", descending=True, values=True, indices="int64")


def _value_of(key: Expr) -> Expr:
    """The float32 of a descending key of 32 bits."""
    key = tirx.bitwise_xor(key.astype("int32"), tirx.const(-1, "int32"))
    negative = tirx.bitwise_or(-key, tirx.const(-(2**31), "int32"))
    return tirx.reinterpret("float32", tirx.Select(key < 0, negative, key))


def _columns(first: Expr, lanes: int) -> Expr:
    return tirx.Ramp(tirx.const(first, "int32") if isinstance(first, int) else first, 1, lanes) if lanes > 1 else first


def _wide(value: Expr, lanes: int) -> Expr:
    return value.astype(f"int64x{lanes}" if lanes > 1 else "int64")


def build(rows: int, n: int, target: Target) -> PrimFunc:
    """The kernel: x, values, indices."""
    lanes = min(target.isa.lanes(32), 1 << (n.bit_length() - 1))
    vectors = -(-n // lanes)
    count = min(ACCUMULATORS, vectors)

    def body(x: Any, values: Any, indices: Any) -> None:
        with loop(rows, target.threads and rows * n >= PARALLEL_ELEMENTS) as row, T.sblock("row"):
            start = T.bind(row * n)
            seen = T.sblock_alloc_buffer((count * lanes,), "float32", scope="global")
            best = Best(seen, T.sblock_alloc_buffer((count * lanes,), "int32", scope="global"), lanes)
            for u in range(count):
                best.clear(u * lanes, u * lanes if (u + 1) * lanes <= n else n - lanes)

            def meet(vector: Expr, u: int) -> None:
                # The last vector overlaps its predecessor, and its equal elements come too late.
                column = T.bind(tirx.min(vector * lanes, n - lanes))
                best.meet(u * lanes, load(x, start + column, lanes, "float32"), column)

            with T.serial(0, vectors // count) as i:
                for u in range(count):
                    meet(i * count + u, u)
            for u in range(vectors % count):
                meet(vectors // count * count + u, u)
            best.settle(0, count, values, indices, row)

    return prim_func([("x", rows * n, "float32"), ("values", rows, "float32"), ("indices", rows, "int64")], body)


def reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and indices over the last axis."""
    index = np.argmax(x, -1)  # numpy's too is the first, of NaN before all else
    return np.take_along_axis(x, index[..., None], -1)[..., 0], index
