"""Cumulative sums and products along any axis.

Y[o, t, i] = X[o, 0, i] + ... + X[o, t, i]           or the product; exclusive: without X[o, t, i]
X, Y   (outer, n, inner), dense; any number types, X is converted
sums   float64 for float32 and float64 (PyTorch's choice on CPUs), float32 for 16-bit floats, else Y's integers
limit  inner > 1: memory, vectors run across `inner`; inner = 1: one addition's latency an element
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import relax
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import load, loop, prim_func, splat, store
from graphopt.codegen.kernels.rows import PARALLEL_ELEMENTS
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target

Expr = Any
MOST_VECTORS = 4  # running values side by side: a few cache lines of every row


@dataclass(frozen=True)
class Running:
    """What is accumulated."""

    outer: int
    n: int
    inner: int
    source: str  # dtype of X
    dtype: str  # of Y
    product: bool
    exclusive: bool = False

    @property
    def held(self) -> str:
        """Dtype of the running value."""
        if self.dtype in ("float32", "float64", "int64", "uint64", "uint32"):
            return "float64" if self.dtype == "float32" else self.dtype
        return "float32" if "float" in self.dtype else "int32"


class Scan(Template):
    """Cumulative sums and products; see the module."""

    name: ClassVar[str] = "scan"
    anchors: ClassVar[tuple[str, ...]] = ("relax.cumsum", "relax.cumprod")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take the operator, whatever its axis and dtype."""
        call, where, op = binding.value, binding.var.name, op_of(binding.value)
        shape, source = shape_of(call.args[0]), dtype_of(call.args[0])
        if not math.prod(shape):
            return Decline(where, f"a tensor without elements: {shape}")
        if dtype_of(call) == "bool":
            return Decline(where, "a running value of booleans")
        if call.attrs.axis is None or not shape:
            outer, n, inner = 1, math.prod(shape), 1
        else:
            axis = int(call.attrs.axis) % len(shape)
            outer, n, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        product, exclusive = op == "relax.cumprod", bool(call.attrs.exclusive)
        scan = Running(outer, n, inner, source, dtype_of(call), product, exclusive)
        return KernelCall(
            name=f"{scan.dtype}_{op.removeprefix('relax.')}_{n}__{target.isa.name}".replace("-", "_"),
            key=("scan", scan, target.spec),
            kernel=build(scan, target),
            output=binding.var,
            covers=(binding.var,),
            inputs=(call.args[0],),
        )


def build(scan: Running, target: Target) -> PrimFunc:
    """The kernel: x, y."""
    held, inner = scan.held, scan.inner
    # Booleans are bytes in memory but bits in registers, and TVM has no vectors that go between the two.
    lanes = 1 if scan.source == "bool" else target.isa.lanes(64 if held.endswith("64") else 32)
    parallel = target.threads and scan.outer * scan.n * inner >= PARALLEL_ELEMENTS

    def body(x: Any, y: Any) -> None:
        def run(start: Expr, count: int, width: int) -> None:
            """`count` vectors of neighbouring columns, from the first row to the last."""
            with T.sblock("columns"):
                sums = T.sblock_alloc_buffer((count * width,), held, scope="global")
                at = T.bind(start)
                for u in range(count):
                    store(sums, u * width, splat(1 if scan.product else 0, width, held), width, held)
                with T.serial(0, scan.n) as t:
                    for u in range(count):
                        place = at + t * inner + u * width
                        before = load(sums, u * width, width, held)
                        value = load(x, place, width, held)
                        if scan.exclusive:
                            store(y, place, before, width, held)
                        store(sums, u * width, before * value if scan.product else before + value, width, held)
                        if not scan.exclusive:
                            store(y, place, load(sums, u * width, width, held), width, held)

        whole, left = divmod(inner // lanes, MOST_VECTORS)
        row = scan.n * inner
        if whole:
            with loop(scan.outer * whole, parallel) as block:
                run(block // whole * row + block % whole * (MOST_VECTORS * lanes), MOST_VECTORS, lanes)
        if left:
            with loop(scan.outer, parallel) as line:
                run(line * row + whole * MOST_VECTORS * lanes, left, lanes)
        if rest := inner % lanes:
            with loop(scan.outer * rest, parallel) as line:
                run(line // rest * row + line % rest + (inner - rest), 1, 1)

    size = scan.outer * scan.n * inner
    return prim_func([("x", size, scan.source), ("y", size, scan.dtype)], body)


def reference(x: np.ndarray, scan: Running) -> np.ndarray:
    """What the kernel computes, along axis 1 of [outer, n, inner]."""
    wide = x.astype(scan.held)
    running = (np.cumprod if scan.product else np.cumsum)(wide, axis=1, dtype=scan.held)
    if scan.exclusive:
        first = np.full_like(running[:, :1], 1 if scan.product else 0)
        running = np.concatenate([first, running[:, :-1]], 1)
    return running.astype(scan.dtype)
