"""Few rows times the transpose of a run-time matrix: what one query says about every key. The keys are read in place.

    C[b, r, j] = epilogue(sum_d A[b, r, d] * K[b, j, d])       r < 5
    A, K  float32 seen through views: d contiguous, the rest at any strides, as heads inside of tokens are
    limit: memory, K is read once; lanes log2(lanes) shuffles for every `lanes` results

As many rows of K as a vector has lanes are multiplied with the row of A at once; their partial sums, transposed as a
square, add up to a vector of results. The last group overlaps its predecessor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, shape_of
from graphopt.codegen.kernels.emit import Registers, load, loop, prim_func, store
from graphopt.codegen.kernels.epilogue import Epilogue, absorb
from graphopt.codegen.kernels.rows import PARALLEL_ELEMENTS
from graphopt.codegen.kernels.squares import transposed
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.views import Factors, View, view_of
from graphopt.errors import Decline
from graphopt.targets.target import Target

Expr = Any
MOST_ROWS = 4  # of A: with more a register tile reads K less often, and its transpose pays
LEAST_LANES = 4


@dataclass(frozen=True)
class Seen:
    """A view without its base: what shapes the code."""

    size: int  # elements of the base
    offset: int
    dims: tuple[Factors, ...]

    def view(self, base: Any = None) -> View:
        """With the base again, of which addresses know nothing."""
        return View(base, self.offset, self.dims)


@dataclass(frozen=True)
class Dots:
    """Everything that determines the kernel."""

    lead: tuple[int, ...]
    m: int
    n: int
    k: int
    lanes: int
    a: Seen  # (*lead, m, k)
    b: Seen  # (*own, k, n), own: lead or all ones
    epilogue: Epilogue
    parallel: bool


class RowDots(Template):
    """C = epilogue(A K^T) for few rows of A; see the module."""

    name: ClassVar[str] = "row-dots"
    anchors: ClassVar[tuple[str, ...]] = ("relax.matmul",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take a product of few rows with a matrix that lies transposed, perhaps among others."""
        call, where = binding.value, binding.var.name
        shapes = [shape_of(x) for x in call.args]
        if any(len(s) < 2 or 0 in s for s in shapes) or shapes[0][-2] > MOST_ROWS:
            return Decline(where, f"{shapes[0]} is not a matrix of at most {MOST_ROWS} rows")
        if any(dtype_of(x) != "float32" for x in (*call.args, binding.var)):
            return Decline(where, "an operand is not float32")
        lead, own = shapes[0][:-2], shapes[1][:-2]
        if math.prod(own) != 1 and own != lead:
            return Decline(where, f"batch dimensions {lead} and {own} differ")
        a, b = (view_of(flow, x) for x in call.args)
        if any(flow.constant(v.base) is not None for v in (a, b)):
            return Decline(where, "an operand is constant")
        (m, k), n = shapes[0][-2:], shapes[1][-1]
        if b.stride(-2) != 1 or (a.stride(-1) != 1 and k > 1):
            return Decline(where, "its second operand does not lie transposed, or the first not in rows")
        lanes = math.gcd(target.isa.lanes(32), k)
        if lanes < LEAST_LANES or n < lanes:
            return Decline(where, f"{n} rows of {k} elements fill no square of vectors")
        after = absorb(flow, binding.var)
        rows, keys = (Seen(math.prod(shape_of(v.base)), v.offset, v.dims) for v in (a, b))
        work = math.prod(lead) * m * n * k
        dots = Dots(lead, m, n, k, lanes, rows, keys, after.epilogue, target.threads and work >= 4 * PARALLEL_ELEMENTS)
        return KernelCall(
            name=f"f32_row_dots{after.epilogue.name}_{n}x{k}__{target.isa.name}".replace("-", "_"),
            key=(dots, target.spec),
            kernel=build(dots),
            output=after.output,
            covers=after.covers,
            inputs=(a.base, b.base, *after.inputs),
            constants=after.constants,
            parameters={"lanes": lanes},
        )

    def reference(self, a: Array, b: Array, after: Epilogue, operands: list[Array]) -> Array:
        """epilogue(a @ b) with rows flattened, in float64."""
        out = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        return after.reference(out.reshape(-1, out.shape[-1]), operands)


def build(dots: Dots) -> PrimFunc:
    """The kernel: a, b, operands of the epilogue, c."""
    p, lanes, after = dots, dots.lanes, dots.epilogue
    batch = math.prod(p.lead)
    params = [("a", p.a.size, "float32"), ("b", p.b.size, "float32")]
    params += [*after.buffers(False), *after.buffers(True), ("c", batch * p.m * p.n, "float32")]
    a, b = p.a.view(), p.b.view()
    groups = -(-p.n // lanes)

    def body(*buffers: Any) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        extra = after.bind(named)
        with loop(batch, p.parallel) as sample, T.sblock("sample"):
            a_start, b_start = (T.bind(_start(v, sample)) for v in (a, b))
            with T.serial(0, groups) as group:
                first = T.bind(tirx.min(group * lanes, p.n - lanes))
                keys = [T.bind(b_start + b.address(len(b.dims) - 1, first + i)) for i in range(lanes)]
                with T.serial(0, p.m) as row:
                    query = T.bind(a_start + a.address(len(a.dims) - 2, row))
                    sums = Registers(lanes, lanes, "float32")
                    with T.serial(0, p.k // lanes) as t:
                        part = T.bind(load(named["a"], query + t * lanes, lanes, "float32"))
                        for i in range(lanes):
                            sums[i] = sums[i] + part * load(named["b"], keys[i] + t * lanes, lanes, "float32")
                    columns = transposed([T.bind(sums[i]) for i in range(lanes)], lanes)
                    while len(columns) > 1:
                        columns = [x + y for x, y in zip(columns[::2], columns[1::2], strict=True)]
                    at = T.bind(sample * p.m + row)
                    value = after.apply(T.bind(columns[0]), extra, at, first, lanes, "float32")
                    store(named["c"], at * p.n + first, value, lanes, "float32")

    return prim_func(params, body)


def _start(view: View, sample: Expr) -> Expr:
    """Index of the first element of a sample's matrix."""
    at = tirx.const(view.offset, "int32")
    for dim in reversed(range(len(view.dims) - 2)):
        extent = view.shape[dim]
        if extent > 1:
            at = at + view.address(dim, tirx.floormod(sample, extent))
            sample = tirx.floordiv(sample, extent)
    return at
