"""Transposes: two groups of dimensions change places, in front of them any number that stay.

    Y[b, j, i] = X[b, i, j]
    X  (B, M, N) in float32, after merging dimensions that stay together
    limit: bandwidth; lanes log2(lanes) shuffles for each square of lanes x lanes elements

Squares are read as vectors, transposed in registers, and written as vectors; the last ones overlap their predecessors.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, shape_of
from graphopt.codegen.kernels.emit import load, loop, prim_func, store
from graphopt.codegen.kernels.rows import PARALLEL_ELEMENTS
from graphopt.codegen.kernels.squares import transposed
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target

# Smaller squares gain nothing over TVM's loops.
LEAST = 4


class Transpose(Template):
    """permute_dims that is a batch of plain transposes."""

    name: ClassVar[str] = "transpose"
    anchors: ClassVar[tuple[str, ...]] = ("relax.permute_dims",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take transposes of float32 whose sides are no shorter than a small vector."""
        call, where = binding.value, binding.var.name
        x = call.args[0]
        if flow.constant(x) is not None or dtype_of(x) != "float32":
            return Decline(where, "a constant" if flow.constant(x) is not None else dtype_of(x))
        shape = shape_of(x)
        axes = [int(a) for a in call.attrs.axes] if call.attrs.axes else list(range(len(shape)))[::-1]
        sides = plain(shape, axes)
        if sides is None:
            return Decline(where, f"axes {axes} of {shape} are no plain transpose")
        batch, rows, columns = sides
        lanes = min(target.isa.lanes(), 1 << (min(rows, columns).bit_length() - 1)) if rows and columns else 0
        if lanes < LEAST or not batch:
            return Decline(where, f"{rows} x {columns} elements")
        return KernelCall(
            name=f"f32_transpose_{rows}x{columns}__{target.isa.name}".replace("-", "_"),
            key=(sides, lanes, target.spec),
            kernel=build(batch, rows, columns, lanes, target),
            output=binding.var,
            covers=(binding.var,),
            inputs=(x,),
            parameters={"lanes": lanes},
        )

    def reference(self, x: Array) -> Array:
        """(B, M, N) to (B, N, M)."""
        return np.swapaxes(x, 1, 2)


def plain(shape: tuple[int, ...], axes: list[int]) -> tuple[int, int, int] | None:
    """(batch, rows, columns) of the transpose that `axes` amount to; None where they move more than two groups."""
    moved = [a for a in axes if shape[a] != 1]
    still = [a for a in range(len(shape)) if shape[a] != 1]
    fixed = 0
    while fixed < len(moved) and moved[fixed] == still[fixed]:
        fixed += 1
    rest = moved[fixed:]
    if not rest:
        return None
    turn = rest.index(still[fixed])  # rest = columns' axes, then rows' axes
    if rest[turn:] + rest[:turn] != still[fixed:]:
        return None
    batch, rows, columns = (math.prod(shape[a] for a in part) for part in (moved[:fixed], rest[turn:], rest[:turn]))
    return batch, rows, columns


def build(batch: int, rows: int, columns: int, lanes: int, target: Target) -> PrimFunc:
    """The kernel: x, y."""
    down, across = -(-rows // lanes), -(-columns // lanes)
    size = batch * rows * columns

    def body(x: Any, y: Any) -> None:
        with loop(batch * across, target.threads and size >= PARALLEL_ELEMENTS) as task:
            image = T.Bind(tirx.floordiv(task, across) * (rows * columns)) if batch > 1 else 0
            column = T.Bind(tirx.min(tirx.floormod(task, across) * lanes, columns - lanes))
            with T.serial(0, down) as i:
                row = T.Bind(tirx.min(i * lanes, rows - lanes))
                start = image + row * columns + column
                square = [T.Bind(load(x, start + n * columns, lanes, "float32")) for n in range(lanes)]
                for n, vector in enumerate(transposed(square, lanes)):
                    store(y, image + (column + n) * rows + row, vector, lanes, "float32")

    return prim_func([("x", size, "float32"), ("y", size, "float32")], body)
