"""Rows written to, or combined with, rows of a copy, one after the other in the order of their indices.

    Y = X;  for i in 0 .. m - 1:  Y[I[i], :] = S[i, :]           or += * min max
    X, Y  (rows, width), S (m, width), any dtype, dense; I (m,) int64, moved to the nearest row that exists
    limit: memory, (2 rows + 3 m) * width elements; X is not read where it is known to be zero

Without combining, every row of Y is written once, from X or from the last row of S that goes there.

Threads share out columns, so that rows of the same index never meet.
Source: the semantics of torch.scatter_add and torch.index_add on CPUs, where duplicates add up in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, shape_of
from graphopt.codegen.kernels.emit import accumulator, load, loop, prim_func, splat, store
from graphopt.codegen.kernels.rows import PARALLEL_ELEMENTS, each_of_row
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target

Expr = Any
COLUMN_BYTES = 1024  # the least width of a thread's share of columns: whole cache lines, and a prefetcher's stride

COMBINE: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "max": tirx.max,
    "min": tirx.min,
}


@dataclass(frozen=True)
class Write:
    """What is written where."""

    rows: int
    width: int
    count: int  # rows of S
    dtype: str
    kind: str  # "update" or a key of COMBINE
    from_zero: bool  # X is zero and no parameter

    @property
    def held(self) -> str:
        """Dtype that rows are combined in."""
        return accumulator(self.dtype) if "float" in self.dtype and self.kind != "update" else self.dtype


class ScatterRows(Template):
    """scatter_nd of whole rows; see the module."""

    name: ClassVar[str] = "scatter-rows"
    anchors: ClassVar[tuple[str, ...]] = ("relax.scatter_nd",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take the operator where one index names a row."""
        call, where = binding.value, binding.var.name
        x, index, source = call.args
        shape, kind = shape_of(x), str(call.attrs.reduction)
        if shape_of(index)[-1] != 1 or dtype_of(index) != "int64":
            return Decline(where, f"places of {shape_of(index)[-1]} indices in {dtype_of(index)}")
        if kind != "update" and kind not in COMBINE:
            return Decline(where, f"rows combined by {kind}")
        known = flow.constant(x)
        zero = known is not None and not np.signbit(known).any() and not known.any()
        width = math.prod(shape[1:])
        count = math.prod(shape_of(index))
        write = Write(shape[0], width, count, dtype_of(x), kind, zero)
        return KernelCall(
            name=f"{write.dtype}_scatter_{kind}_{write.rows}x{width}__{target.isa.name}".replace("-", "_"),
            key=("scatter-rows", write, target.spec),
            kernel=build(write, target),
            output=binding.var,
            covers=(binding.var,),
            inputs=(*([] if zero else [x]), index, source),
            scratch_bytes=(write.rows * 4,) if kind == "update" else (),
        )


def build(write: Write, target: Target) -> PrimFunc:
    """The kernel: x (unless it is zero), index, source, y; for "update" the last writer of each row, -1 for none."""
    w = write
    bits = 8 if w.dtype == "bool" else int("".join(c for c in w.dtype if c.isdigit()))
    lanes = 1 if w.dtype == "bool" else target.isa.vector_bits // max(bits, 32 if "float" in w.dtype else bits)
    buffers = [] if w.from_zero else [("x", w.rows * w.width, w.dtype)]
    buffers += [("index", w.count, "int64"), ("source", w.count * w.width, w.dtype), ("y", w.rows * w.width, w.dtype)]
    buffers += [("writers", w.rows, "int32")] if w.kind == "update" else []
    parallel = target.threads and (w.rows + w.count) * w.width >= PARALLEL_ELEMENTS
    share = max(lanes, COLUMN_BYTES * 8 // bits)
    shares = w.width // share if parallel else 1

    def body(*given: Any) -> None:
        index, source, y = given[w.from_zero ^ 1 :][:3]

        def place(i: Expr) -> Expr:
            clamped = tirx.max(tirx.min(index[i], tirx.const(w.rows - 1, "int64")), tirx.const(0, "int64"))
            return T.bind(clamped.astype("int32"))

        def initial(at: Expr, width: int) -> None:
            if w.from_zero:
                each_of_row(width, lanes, lambda c, n: store(y, at + c, splat(0, n, w.dtype), n, w.dtype))
            else:
                copy(given[0], at, at, width)

        def copy(origin: Any, start: Expr, at: Expr, width: int) -> None:
            each_of_row(width, lanes, lambda c, n: store(y, at + c, load(origin, start + c, n, w.dtype), n, w.dtype))

        def combined(first: Expr, width: int) -> None:
            with T.serial(0, w.rows) as row:
                initial(T.bind(row * w.width + first), width)
            with T.serial(0, w.count) as i:
                to = T.bind(place(i) * w.width + first)
                at = T.bind(i * w.width + first)

                def combine(c: Expr, n: int) -> None:
                    both = load(y, to + c, n, w.held), load(source, at + c, n, w.held)
                    store(y, to + c, COMBINE[w.kind](*both), n, w.held)

                each_of_row(width, lanes, combine)

        def replaced(first: Expr, width: int) -> None:
            with T.serial(0, w.rows) as row:
                at = T.bind(row * w.width + first)
                writer = T.bind(given[-1][row])
                with T.If(writer < 0):
                    with T.Then():
                        initial(at, width)
                    with T.Else():
                        copy(source, T.bind(writer * w.width + first), at, width)

        columns = replaced if w.kind == "update" else combined
        if w.kind == "update":
            with T.serial(0, w.rows) as row:
                T.buffer_store(given[-1], tirx.const(-1, "int32"), [row])
            with T.serial(0, w.count) as i:
                T.buffer_store(given[-1], i, [place(i)])
        if shares <= 1:
            with T.sblock("rows"):
                columns(0, w.width)
            return
        with loop(shares, parallel) as part, T.sblock("columns"):
            columns(T.bind(part * share), share)
        if rest := w.width % share:
            with T.sblock("rest"):
                columns(shares * share, rest)

    return prim_func(buffers, body)


def reference(x: np.ndarray, index: np.ndarray, source: np.ndarray, kind: str) -> np.ndarray:
    """What the kernel computes, one row after the other."""
    combine = getattr(np, {"add": "add", "mul": "multiply", "max": "maximum", "min": "minimum"}.get(kind, ""), None)
    y = x.copy()
    for i, row in enumerate(index.clip(0, len(x) - 1)):
        y[row] = combine(y[row], source[i]) if combine else source[i]
    return y
