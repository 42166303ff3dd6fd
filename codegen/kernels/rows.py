"""Shared by the kernels that work on one row at a time: folding a row, and running over it in vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from graphopt.codegen.kernels.emit import load, splat, store

Expr = Any
ACCUMULATORS = 4  # independent ones, to hide the latency of an addition
PARALLEL_ELEMENTS = 1 << 16  # below this a second thread costs more than it brings


def fold_row(
    width: int, lanes: int, dtype: str, start: float, value: Callable[[Expr, int], Expr], combine: Callable[..., Expr]
) -> Expr:
    """Combine value(offset, lanes) over a row, in any order; the result is bound to a scalar."""
    vectors = width // lanes
    count = min(ACCUMULATORS, vectors)
    parts: list[Expr] = []
    if count:
        sums = T.sblock_alloc_buffer((count * lanes,), dtype, scope="global")
        for u in range(count):
            store(sums, u * lanes, splat(start, lanes, dtype), lanes, dtype)

        def add(at: Expr, u: int) -> None:
            store(sums, u * lanes, combine(load(sums, u * lanes, lanes, dtype), value(at, lanes)), lanes, dtype)

        with T.serial(0, vectors // count) as i:
            for u in range(count):
                add((i * count + u) * lanes, u)
        for u in range(vectors % count):
            add((vectors // count * count + u) * lanes, u)
        for u in range(1, count):
            merged = combine(load(sums, 0, lanes, dtype), load(sums, u * lanes, lanes, dtype))
            store(sums, 0, merged, lanes, dtype)
        parts = [sums[lane] for lane in range(lanes)]
    # The rest of the row, an element at a time and into the same tree.
    parts += [value(vectors * lanes + i, 1) for i in range(width % lanes)]
    while len(parts) > 1:
        pairs = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return T.bind(parts[0])


def each_of_row(width: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """Call body(offset, lanes) for every vector of a row, then for what is left, one by one."""
    if width >= lanes:
        with T.serial(0, width // lanes) as i:
            body(i * lanes, lanes)
    if width % lanes:
        with T.serial(0, width % lanes) as i:
            body(width // lanes * lanes + i, 1)
