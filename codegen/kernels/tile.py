"""The register tile at the heart of dense kernels, and the loops around it.

    C[r, c] = sum_t A[offset(r) + shift(t)] * W[panel(c)][t][c]        for mr rows and nr columns at a time

mr x nr accumulators stay in registers; each step of t broadcasts mr elements of A and loads nr of W, and does mr * nr
multiply-adds. The last tile of rows and the last panel of columns overlap their predecessors, so there is no code for
remainders: start = min(i * mr, m - mr).
    limit: fma_per_cycle * lanes multiply-adds per cycle; two loads per cycle.
Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 2008. Differs: A is read in
place, for it fits the second-level cache in blocks and its rows are contiguous along t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array
from graphopt.codegen.kernels.emit import Buffer, Expr, Registers, load, loop, spread
from graphopt.cost.register_tile import Tile, best_tile
from graphopt.targets.target import Target

# A thread that is woken must have this much to do, or waking it costs more than it saves.
FLOPS_PER_TASK = 200_000
# Tasks that a kernel is cut into whose memory or constants depend on how many there are: as many as may be threads.
TASKS = 16


@dataclass(frozen=True)
class Nest:
    """Sizes of a product and how its loops are cut.

    `reduction` lists the loops of t, outermost first, as (extent, stride in A, stride in W).
    """

    m: int
    n: int
    reduction: tuple[tuple[int, int, int], ...]
    tile: Tile
    block: int  # rows whose part of A stays in the second-level cache
    parallel: bool

    @property
    def panels(self) -> int:
        """Panels of nr columns."""
        return -(-self.n // self.tile.nr)


def plan(
    m: int, n: int, reduction: Sequence[tuple[int, int, int]], row_bytes: int, target: Target, bits: int = 32
) -> Nest:
    """Choose the tile and the blocks of rows; `row_bytes` of A are read for each further row."""
    tile = best_tile(m, n, target.isa, bits)
    flops = 2 * m * n * math.prod(e for e, _, _ in reduction)
    parallel = target.threads and flops >= 2 * FLOPS_PER_TASK
    rows = max(target.l2_bytes // 2 // max(row_bytes, 1), 4 * tile.mr)
    blocks = -(-m // rows)
    if parallel:
        panels = -(-n // tile.nr)
        wanted = min(flops // FLOPS_PER_TASK, 16)
        blocks = max(blocks, min(-(-wanted // panels), m // tile.mr))
    return Nest(m, n, tuple(reduction), tile, -(-m // max(blocks, 1)), parallel)


def pack(weight: Array, nest_n: int, tile: Tile) -> Array:
    """Columns of (t, n) as (panels, t, nr); the last panel overlaps its predecessor."""
    panels = -(-nest_n // tile.nr)
    first = np.minimum(np.arange(panels) * tile.nr, nest_n - tile.nr)
    columns = first[:, None] + np.arange(tile.nr)
    return np.ascontiguousarray(weight[:, columns].transpose(1, 0, 2))


Finish = Callable[[Expr, Expr, Expr], None]  # row, column, vector of results


def emit_nest(
    nest: Nest,
    a: Buffer,
    w: Buffer,
    a_offset: Callable[[Expr], Expr],
    w_offset: Callable[[Expr, Expr], Expr],
    finish: Finish,
    dtype: str,
    outer: int = 1,
    begin: Callable[[Expr], None] | None = None,
    trips: Expr | None = None,
) -> None:
    """Emit all loops: (outer, row blocks, panels) over threads, then tiles of rows, then the reduction.

    Args:
        a_offset: index in `a` of a row's first element.
        w_offset: index in `w` of a panel's first element, from the panel's number and its first column.
        finish: emits the store of a vector of results at a row and a column of the product.
        outer: how often the whole product is repeated (batch, groups).
        trips: the first extent of the reduction, as a value that the compiler cannot see. It would unroll a short
            reduction wholly and hoist all of W out of the loop over rows, into memory for want of registers.
        begin: called with the number of the repetition before anything else of it is emitted.
    """
    tile, blocks = nest.tile, -(-nest.m // nest.block)
    # Every block has the same number of rows, and the last one overlaps.
    with loop(outer * blocks * nest.panels, nest.parallel) as task:
        if begin is not None:
            begin(T.Bind(tirx.floordiv(task, blocks * nest.panels)) if outer > 1 else 0)
        panel = T.Bind(tirx.floormod(task, nest.panels))
        column = T.Bind(tirx.min(panel * tile.nr, nest.n - tile.nr))
        w_start = T.Bind(w_offset(panel, column))
        block = tirx.floormod(tirx.floordiv(task, nest.panels), blocks)
        first = T.Bind(tirx.min(block * nest.block, nest.m - nest.block)) if blocks > 1 else 0
        with T.serial(0, -(-nest.block // tile.mr)) as i:
            row = T.Bind(first + tirx.min(i * tile.mr, nest.block - tile.mr))
            emit_tile(
                nest, a, w, [a_offset(row + r) for r in range(tile.mr)], w_start, row, column, finish, dtype, trips
            )


def emit_tile(
    nest: Nest,
    a: Buffer,
    w: Buffer,
    a_starts: Sequence[Expr],
    w_start: Expr,
    row: Expr,
    column: Expr,
    finish: Finish,
    dtype: str,
    trips: Expr | None = None,
) -> None:
    """Emit one register tile: clear, reduce, finish."""
    tile, lanes = nest.tile, nest.tile.lanes
    acc = Registers(tile.mr * tile.vectors, lanes, dtype)

    def reduce(levels: Sequence[tuple[int, int, int]], a_shift: Expr, w_shift: Expr) -> None:
        if levels:
            extent, a_stride, w_stride = levels[0]
            if extent == 1:
                reduce(levels[1:], a_shift, w_shift)
                return
            with T.serial(0, extent if trips is None or len(levels) < len(nest.reduction) else trips) as t:
                reduce(levels[1:], a_shift + t * a_stride, w_shift + t * w_stride)
            return
        row_of_w = [load(w, w_start + w_shift + v * lanes, lanes, dtype) for v in range(tile.vectors)]
        for r in range(tile.mr):
            element = spread(load(a, a_starts[r] + a_shift, 1, dtype), lanes)
            for v in range(tile.vectors):
                i = r * tile.vectors + v
                acc[i] = acc[i] + element * row_of_w[v]

    reduce(nest.reduction, 0, 0)
    for r in range(tile.mr):
        for v in range(tile.vectors):
            finish(row + r, column + v * lanes, acc[r * tile.vectors + v])
