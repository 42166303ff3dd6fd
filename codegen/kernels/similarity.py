"""A product of two run-time matrices of which only each row's maximum is wanted: it is never written to memory.

    S = epilogue(A B);   Y[b, r] = max_c S[b, r, c],   I[b, r] = the least c with S[b, r, c] = Y[b, r]
    A  (batch, m, k), B (batch or 1, k, n), float32, row-major; NaN is greater than everything
    limit: 2 m n k FLOPs at the register tile's rate (`tile.py`), and 6 operations for each vector of S

A block of rows meets panel after panel of B. Each row keeps one vector of its best elements and one of their columns
(`row_max.py`); tiles and panels overlap, for an element that is met again changes nothing.
Source: the tiling of `tile.py`; what it is for: Bolya et al., Token Merging, ICLR 2023, arXiv:2210.09461.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernels.emit import loop, prim_func
from graphopt.codegen.kernels.epilogue import Epilogue, absorb
from graphopt.codegen.kernels.row_max import Best, not_a_row_max
from graphopt.codegen.kernels.row_max import reference as row_max
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.kernels.tile import Nest, emit_tile, plan
from graphopt.errors import Decline
from graphopt.targets.target import Target

Expr = Any
BLOCK_ROWS = 64  # rows that meet a panel while it is in the first-level cache; their best elements are there as well


@dataclass(frozen=True)
class Match:
    """Everything that determines the kernel."""

    batch: int
    b_batched: bool
    k: int
    nest: Nest
    epilogue: Epilogue

    @property
    def kept(self) -> int:
        """Elements of each of the two buffers of best elements: a region for every block that may run at once."""
        blocks = self.batch * -(-self.nest.m // self.nest.block) if self.nest.parallel else 1
        return blocks * self.nest.block * self.nest.tile.lanes


class Similarity(Template):
    """max over the rows of a product; see the module."""

    name: ClassVar[str] = "similarity"
    anchors: ClassVar[tuple[str, ...]] = ("relax.matmul",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take a product whose only reader, behind elementwise operators, is a maximum over its rows."""
        call, where = binding.value, binding.var.name
        a, b = call.args
        a_shape, b_shape = shape_of(a), shape_of(b)
        after = absorb(flow, binding.var)
        user = flow.sole_user(after.output)
        if user is None or op_of(user.value) != "relax.topk":
            return Decline(where, "more than the maximum of each row is wanted")
        refusal = not_a_row_max(user.value)
        if refusal:
            return Decline(where, refusal)
        if any(dtype_of(x) != "float32" or flow.constant(x) is not None for x in (a, b)):
            return Decline(where, "an operand is constant, or not float32")
        lead, own = a_shape[:-2], b_shape[:-2]
        if len(a_shape) < 2 or len(b_shape) < 2 or (math.prod(own) != 1 and own != lead):
            return Decline(where, f"batch dimensions {lead} and {own} differ")
        m, k, n = a_shape[-2], a_shape[-1], b_shape[-1]
        nest = plan(m, n, ((k, 1, n),), k * 4, target)
        mr = nest.tile.mr
        # Blocks are equally long: what the last one shares with its predecessor is computed twice.
        block = -(-m // -(-m // BLOCK_ROWS))
        nest = Nest(m, n, nest.reduction, nest.tile, block, nest.parallel)
        product = Match(math.prod(lead), math.prod(own) > 1, k, nest, after.epilogue)
        return KernelCall(
            name=f"f32_bmm{after.epilogue.name}_max_{nest.tile}__{target.isa.name}".replace("-", "_"),
            key=(product, target.spec),
            kernel=build(product),
            output=user.var,
            covers=(*after.covers, user.var),
            inputs=(a, b, *after.inputs),
            constants=after.constants,
            scratch_bytes=(product.kept * 4, product.kept * 4),
            parameters={"mr": mr, "nr": nest.tile.nr, "block": block},
        )

    def reference(self, a: Array, b: Array, after: Epilogue, operands: list[Array]) -> tuple[Array, Array]:
        """Maxima and indices, rows flattened, of a product in float64."""
        out = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        return row_max(after.reference(out.reshape(-1, out.shape[-1]), operands))


def build(product: Match) -> PrimFunc:
    """The kernel: a, b, operands of the epilogue, values, indices, and the two buffers of best elements."""
    p, nest, after = product, product.nest, product.epilogue
    tile, m, n, k = nest.tile, nest.m, nest.n, product.k
    blocks = -(-m // nest.block)
    params = [("a", p.batch * m * k, "float32"), ("b", (p.batch if p.b_batched else 1) * k * n, "float32")]
    params += [*after.buffers(False), *after.buffers(True)]
    params += [("values", p.batch * m, "float32"), ("indices", p.batch * m, "int64")]
    params += [("best", p.kept, "float32"), ("places", p.kept, "int32")]

    def body(*buffers: Any) -> None:
        named = {name: buffer for (name, _, _), buffer in zip(params, buffers, strict=True)}
        extra = after.bind(named)
        best = Best(named["best"], named["places"], tile.lanes)
        with loop(p.batch * blocks, nest.parallel) as task, T.sblock("block"):
            sample = T.bind(tirx.floordiv(task, blocks))
            first = T.bind(sample * m + tirx.min(tirx.floormod(task, blocks) * nest.block, m - nest.block))
            region = T.bind(task * nest.block if nest.parallel else task * 0)

            def kept(row: Expr) -> Expr:
                return (region + row) * tile.lanes

            with T.serial(0, nest.block) as row:
                best.clear(kept(row))
            with T.serial(0, nest.panels) as panel:
                column = T.bind(tirx.min(panel * tile.nr, n - tile.nr))
                with T.serial(0, -(-nest.block // tile.mr)) as i:
                    top = T.bind(tirx.min(i * tile.mr, nest.block - tile.mr))

                    def finish(row: Expr, col: Expr, value: Expr) -> None:
                        value = after.apply(value, extra, first + row, col, tile.lanes, "float32")
                        best.meet(kept(row), value, col)

                    starts = [(first + top + r) * k for r in range(tile.mr)]
                    w_start = column + sample * (k * n if p.b_batched else 0)
                    emit_tile(nest, named["a"], named["b"], starts, w_start, top, column, finish, "float32")
            with T.serial(0, nest.block) as row:
                best.settle(kept(row), 1, named["values"], named["indices"], first + row)

    return prim_func(params, body)
