"""Scaled dot product attention as one kernel.

    O[b, i, h] = softmax_j(scale Q[b, i, h] . K[b, j, h'] + mask[b, h, i, j]) V[b, j, h']     h' = h's shared head
    Q, K, V   any float; read through strides where the graph only reshapes, permutes, slices or repeats a projection
    O         written in the order in which the graph goes on with it, mostly [b, i, (h d)]
    mask      none, causal, float (added) or bool (where true is seen); broadcast over any of b, h, i
    scratch   for each of up to 16 groups of heads: K as panels [j / NR][d][NR], V as panels [d / NR][j][NR], and a
              block of score rows, so that both products are register-tiled GEMMs over dense panels
    limit     4 b h n m d FLOPs; K and V are packed once per head, a panel stays in L1 for a block of rows

Rows that see nothing are zero, as in PyTorch's scaled_dot_product_attention; the written-out form gives NaN there.
Source: Kazushige Goto and Robert van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008 (the panels).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Dataflow, dtype_of, shape_of
from graphopt.codegen.kernels.attention_match import Found, find
from graphopt.codegen.kernels.attention_tile import Tile, panels, tile_for
from graphopt.codegen.kernels.emit import load, loop, prim_func, splat, spread, store
from graphopt.codegen.kernels.squares import transposed
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.codegen.views import View
from graphopt.errors import Decline
from graphopt.targets.target import Target

Expr = Any
MOST_GROUPS = 16
PARALLEL_FLOPS = 2_000_000  # below this a second thread costs more than it brings


class Attention(Template):
    """Fused attention; see the module."""

    name: ClassVar[str] = "attention"
    anchors: ClassVar[tuple[str, ...]] = ("relax.nn.attention", "relax.nn.attention_bias", "relax.matmul")

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take an attention operator, or a softmax between two products."""
        found = find(flow, binding)
        if isinstance(found, Decline):
            return found
        tile = tile_for(found.n, found.m, found.d, target)
        sources = _distinct([found.q.base, found.k.base, found.v.base] + ([found.mask.view.base] if found.mask else []))
        kernel, scratch = build(found, tile, sources, target)
        key = (
            "attention",
            tile,
            target.spec,
            found.dtype,
            tuple((sources_index(sources, v.base), v.offset, v.dims) for v in found.views),
            tuple((shape_of(s), dtype_of(s)) for s in sources),
            found.out_strides,
            found.scale,
            found.causal,
            found.safe,
            (found.mask.keeps, found.mask.fill) if found.mask else None,
        )
        return KernelCall(
            name=f"f32_attention_{found.d}_{tile.mr}x{tile.nr}__{target.isa.name}".replace("-", "_"),
            key=key,
            kernel=kernel,
            output=found.output,
            covers=found.covers,
            inputs=tuple(sources),
            scratch_bytes=(scratch,),
            parameters={"mr": tile.mr, "nr": tile.nr, "rows": tile.rows},
        )


def _distinct(exprs: list[relax.Expr]) -> list[relax.Expr]:
    kept: list[relax.Expr] = []
    for expr in exprs:
        if not any(expr.same_as(k) for k in kept):
            kept.append(expr)
    return kept


def sources_index(sources: list[relax.Expr], base: relax.Expr) -> int:
    """Which of the kernel's inputs a view looks at."""
    return next(i for i, s in enumerate(sources) if s.same_as(base))


def build(found: Found, tile: Tile, sources: list[relax.Expr], target: Target) -> tuple[PrimFunc, int]:
    """The kernel over its sources, output and scratch; and the bytes of scratch."""
    heads = found.b * found.h
    # Fewer groups than heads bound the scratch; one is enough where there are no threads.
    groups = min(heads, MOST_GROUPS) if target.threads else 1
    per_group = -(-heads // groups)
    groups = -(-heads // per_group)
    lanes = tile.lanes
    m_padded, d_padded = (-(-x // lanes) * lanes for x in (found.m, found.d))
    k_size, v_size, s_size = m_padded * found.d, d_padded * found.m, tile.rows * m_padded
    group_size = -(-(k_size + v_size + s_size + tile.rows) // 16) * 16
    parallel = target.threads and 4 * heads * found.n * found.m * found.d >= PARALLEL_FLOPS
    buffers = [(f"x{i}", math.prod(shape_of(s)), dtype_of(s)) for i, s in enumerate(sources)]
    buffers += [("out", heads * found.n * found.d, found.dtype), ("scratch", groups * group_size, "float32")]

    def body(*args: Any) -> None:
        *inputs, out, scratch = args

        def source(view: View) -> Any:
            return inputs[sources_index(sources, view.base)]

        with loop(groups, parallel) as g, T.serial(0, per_group) as within, T.sblock("head"):
            head = T.bind(tirx.min(g * per_group + within, heads - 1))
            emitter = _Head(found, tile, head // found.h, head % found.h, out, scratch, source)
            emitter.place(g * group_size, k_size, v_size, m_padded, d_padded)
            emitter.emit()

    return prim_func(buffers, body), groups * group_size * 4


class _Head:
    """Emits the work on one head of one sample."""

    def __init__(
        self, found: Found, tile: Tile, b: Expr, h: Expr, out: Any, scratch: Any, source: Callable[[View], Any]
    ) -> None:
        self.f, self.t, self.b, self.h, self.out, self.scratch, self.source = found, tile, b, h, out, scratch, source

    def place(self, start: Expr, k_size: int, v_size: int, m_padded: int, d_padded: int) -> None:
        """Fix where in the scratch the panels and the scores lie."""
        self.keys, self.values, self.scores = start, start + k_size, start + k_size + v_size
        self.sums = self.scores + self.t.rows * m_padded
        self.m_padded, self.d_padded = m_padded, d_padded

    def emit(self) -> None:
        """Pack, then blocks of rows: scores, softmax, product with V."""
        f, t = self.f, self.t
        with T.attr(0, "compute_scope", "pack"):
            self.pack_keys()
            self.pack_values()
        with T.serial(0, -(-f.n // t.rows)) as block:
            first = T.bind(tirx.min(block * t.rows, f.n - t.rows))
            # Keys beyond the last one that the block's last row sees are left out.
            seen = f.m if f.causal is None else T.bind(tirx.max(1, tirx.min(f.m, first + t.rows + f.causal)))
            # Three functions: together, LLVM keeps the constants of exp in registers that the products need.
            with T.attr(0, "compute_scope", "scores"):
                self.products(first, seen)
            with T.attr(0, "compute_scope", "softmax"), T.serial(0, t.rows) as i:
                self.softmax(first, i, seen)
            with T.attr(0, "compute_scope", "values"):
                self.weigh(first, seen)
            # A statement of this function: LLVM would take the loop's step for a part of the last one otherwise.
            T.buffer_store(self.scratch, tirx.const(0.0, "float32"), [self.sums])

    def start(self, view: View) -> Expr:
        return view.offset + view.address(0, self.b) + view.address(2, self.h)

    def pack_keys(self) -> None:
        """K to panels [m / NR][d][NR], the last one as narrow as its vectors; columns beyond m repeat the last key."""
        f, t = self.f, self.t
        key, base = self.source(f.k), T.bind(self.start(f.k))
        row, column = f.k.stride(1) or 0, f.k.stride(3) or 0

        def panel(first: Expr, vectors: int) -> None:
            with T.serial(0, f.d) as c:
                for r in range(vectors):
                    at = first + r * t.lanes
                    to = self.keys + first * f.d + c * (vectors * t.lanes) + r * t.lanes
                    index = [tirx.Ramp(base + at * row + c * column, row, t.lanes)] if row else None
                    value = tirx.BufferLoad(key, index) if index else spread(key[base + c * column], t.lanes)
                    store(self.scratch, to, _widen(value, f.dtype, t.lanes), t.lanes, "float32")

        full = f.m // t.nr
        if full:
            with T.serial(0, full) as p:
                panel(p * t.nr, t.nv)
        left = f.m - full * t.nr
        if left:
            width = -(-left // t.lanes) * t.lanes
            with T.serial(0, f.d) as c, T.serial(0, width) as j:
                at = tirx.min(full * t.nr + j, f.m - 1)
                value = _widen(key[base + at * row + c * column], f.dtype, 1)
                T.buffer_store(self.scratch, value, [self.keys + full * t.nr * f.d + c * width + j])

    def pack_values(self) -> None:
        """V to panels [d / NR][m][NR], the last one as narrow as its vectors, filled up with zeros."""
        f, t = self.f, self.t
        value, base = self.source(f.v), T.bind(self.start(f.v))
        row, column = f.v.stride(1) or 0, f.v.stride(3) or 0
        if row == 1 and column > 1 and f.d % t.lanes == 0 and f.m >= t.lanes and f.dtype == "float32":
            self.pack_turned_values(value, base, column)
            return
        with T.serial(0, f.m) as j:
            for first, vectors in panels(f.d, t):
                for r in range(vectors):
                    at = first + r * t.lanes
                    to = self.values + first * f.m + j * (vectors * t.lanes) + r * t.lanes
                    if at + t.lanes <= f.d and column in (0, 1):
                        moved = load(value, base + j * row + at, t.lanes, "float32")
                        store(self.scratch, to, moved, t.lanes, "float32")
                        continue
                    for lane in range(t.lanes):
                        inside = at + lane < f.d
                        one = (
                            load(value, base + j * row + (at + lane) * (column or 1), 1, "float32")
                            if inside
                            else splat(0, 1, "float32")
                        )
                        T.buffer_store(self.scratch, one, [to + lane])

    def pack_turned_values(self, value: Any, base: Expr, column: int) -> None:
        """The same for V as [d, m]: squares are transposed in registers."""
        f, t = self.f, self.t
        for first, vectors in panels(f.d, t):
            for r in range(vectors):
                with T.serial(0, -(-f.m // t.lanes)) as i:
                    at = T.bind(tirx.min(i * t.lanes, f.m - t.lanes))
                    start = base + (first + r * t.lanes) * column + at
                    square = [T.bind(load(value, start + n * column, t.lanes, "float32")) for n in range(t.lanes)]
                    for n, vector in enumerate(transposed(square, t.lanes)):
                        to = self.values + first * f.m + (at + n) * (vectors * t.lanes) + r * t.lanes
                        store(self.scratch, to, vector, t.lanes, "float32")

    def products(self, first: Expr, seen: Expr) -> None:
        """Scores of a block of rows: Q K^T times scale."""
        f, t = self.f, self.t
        query, base = self.source(f.q), T.bind(self.start(f.q))
        row, column = f.q.stride(1) or 0, f.q.stride(3) or 0

        def panel(start: Expr, vectors: int) -> None:
            with T.serial(0, t.rows // t.mr) as tile:
                at = base + (first + tile * t.mr) * row

                def left(i: int, c: Expr) -> Expr:
                    return load(query, at + i * row + c * column, 1, "float32")

                def right(c: Expr, r: int) -> Expr:
                    place = self.keys + start * f.d + c * (vectors * t.lanes) + r * t.lanes
                    return load(self.scratch, place, t.lanes, "float32")

                def write(i: int, r: int, value: Expr) -> None:
                    to = self.scores + (tile * t.mr + i) * self.m_padded + start + r * t.lanes
                    store(self.scratch, to, value * splat(f.scale, t.lanes, "float32"), t.lanes, "float32")

                _multiply(t, vectors, f.d, left, right, write)

        full = f.m // t.nr
        if full:
            count = full if f.causal is None else tirx.min(full, (seen + t.nr - 1) // t.nr)
            with T.serial(0, count) as p:
                panel(p * t.nr, t.nv)
        if full * t.nr < f.m:
            vectors = -(-(f.m - full * t.nr) // t.lanes)
            if f.causal is None:
                panel(full * t.nr, vectors)
            else:
                with T.If(seen > full * t.nr), T.Then():
                    panel(full * t.nr, vectors)

    def softmax(self, first: Expr, i: Expr, seen: Expr) -> None:
        """Mask, then exp(s - max) in place, and one over the sum."""
        f, t = self.f, self.t
        lanes = t.lanes
        at = T.bind(self.scores + i * self.m_padded)
        row = T.bind(first + i)
        lowest = splat(-math.inf, lanes, "float32")
        top = T.sblock_alloc_buffer((lanes,), "float32", scope="global")
        total = T.sblock_alloc_buffer((lanes,), "float32", scope="global")
        store(top, 0, lowest, lanes, "float32")
        store(total, 0, splat(0.0, lanes, "float32"), lanes, "float32")
        whole = f.m // lanes  # vectors without columns beyond m
        count = -(-f.m // lanes) if f.causal is None else T.bind((seen + lanes - 1) // lanes)

        def masked(j: Expr) -> None:
            value = load(self.scratch, at + j, lanes, "float32")
            if f.mask is not None:
                value = self.apply(value, row, j, lanes)
            if f.causal is not None:
                value = tirx.Select(tirx.Ramp(j, 1, lanes) <= spread(row + f.causal, lanes), value, lowest)
            if f.mask is not None or f.causal is not None:
                store(self.scratch, at + j, value, lanes, "float32")
                value = load(self.scratch, at + j, lanes, "float32")
            store(top, 0, tirx.max(load(top, 0, lanes, "float32"), value), lanes, "float32")

        full = whole if f.causal is None else tirx.min(count, whole)
        if whole:
            with T.serial(0, full) as v:
                masked(v * lanes)
        if f.m % lanes:
            if f.causal is None:
                self.last_columns(at, row, whole * lanes, top, lowest)
            else:
                with T.If(count > whole), T.Then():
                    self.last_columns(at, row, whole * lanes, top, lowest)
        most = T.bind(_fold(top, lanes, tirx.max))
        if f.safe:
            most = T.bind(tirx.Select(most == tirx.const(-math.inf, "float32"), tirx.const(0.0, "float32"), most))
        with T.serial(0, count) as v:
            value = tirx.exp(load(self.scratch, at + v * lanes, lanes, "float32") - spread(most, lanes))
            store(self.scratch, at + v * lanes, value, lanes, "float32")
            grown = load(total, 0, lanes, "float32") + load(self.scratch, at + v * lanes, lanes, "float32")
            store(total, 0, grown, lanes, "float32")
        weight = T.bind(_fold(total, lanes, lambda a, b: a + b))
        inverse = tirx.const(1.0, "float32") / weight
        if f.safe:
            inverse = tirx.Select(weight == tirx.const(0.0, "float32"), tirx.const(0.0, "float32"), inverse)
        T.buffer_store(self.scratch, inverse, [self.sums + i])

    def last_columns(self, at: Expr, row: Expr, start: int, top: Any, lowest: Expr) -> None:
        """Mask the vector that reaches beyond m, without reading the mask there."""
        f, lanes = self.f, self.t.lanes
        left = f.m - start
        if f.mask is not None:
            for lane in range(left):
                one = self.apply(load(self.scratch, at + start + lane, 1, "float32"), row, start + lane, 1)
                T.buffer_store(self.scratch, one, [at + start + lane])
        value = load(self.scratch, at + start, lanes, "float32")
        limit: Expr = spread(tirx.const(f.m - 1, "int32"), lanes)
        if f.causal is not None:
            limit = spread(tirx.min(row + f.causal, f.m - 1), lanes)
        value = tirx.Select(tirx.Ramp(start, 1, lanes) <= limit, value, lowest)
        store(self.scratch, at + start, value, lanes, "float32")
        value = load(self.scratch, at + start, lanes, "float32")
        store(top, 0, tirx.max(load(top, 0, lanes, "float32"), value), lanes, "float32")

    def apply(self, value: Expr, row: Expr, j: Expr, lanes: int) -> Expr:
        """A score with the mask added, or cut."""
        assert self.f.mask is not None
        mask = self.f.mask.view
        at = mask.offset + mask.address(0, self.b) + mask.address(1, self.h) + mask.address(2, row)
        step = mask.stride(3)
        buffer = self.source(mask)
        found = (
            tirx.BufferLoad(buffer, [tirx.Ramp(at + j, 1, lanes)])
            if step and lanes > 1
            else buffer[at + (j if step else 0)]
        )
        if lanes > 1 and not step:
            found = spread(found, lanes)
        if str(buffer.dtype) == "bool":
            cut = splat(self.f.mask.fill, lanes, "float32")
            return tirx.Select(found, value, cut) if self.f.mask.keeps else tirx.Select(found, cut, value)
        return value + _widen(found, str(buffer.dtype), lanes)

    def weigh(self, first: Expr, seen: Expr) -> None:
        """Rows of weights times V, divided by their sums."""
        f, t = self.f, self.t
        b_stride, row, h_stride, column = f.out_strides
        base = T.bind(self.b * b_stride + self.h * h_stride)
        for start, vectors in panels(f.d, t):
            with T.serial(0, t.rows // t.mr) as tile:
                at = self.scores + tile * t.mr * self.m_padded

                def left(i: int, j: Expr, at: Expr = at) -> Expr:
                    return load(self.scratch, at + i * self.m_padded + j, 1, "float32")

                def right(j: Expr, r: int, start: int = start, vectors: int = vectors) -> Expr:
                    place = self.values + start * f.m + j * (vectors * t.lanes) + r * t.lanes
                    return load(self.scratch, place, t.lanes, "float32")

                def write(i: int, r: int, value: Expr, start: int = start, tile: Expr = tile) -> None:
                    scaled = value * spread(self.scratch[self.sums + tile * t.mr + i], t.lanes)
                    to = base + (first + tile * t.mr + i) * row + (start + r * t.lanes) * column
                    inside = f.d - (start + r * t.lanes)
                    if inside >= t.lanes and column == 1:
                        store(self.out, to, scaled, t.lanes, "float32")
                        return
                    one = T.sblock_alloc_buffer((t.lanes,), "float32", scope="global")
                    store(one, 0, scaled, t.lanes, "float32")
                    for lane in range(min(inside, t.lanes)):
                        store(self.out, to + lane * column, one[lane], 1, "float32")

                _multiply(t, vectors, seen, left, right, write)


def _multiply(tile: Tile, vectors: int, depth: Expr, left: Any, right: Any, write: Any) -> None:
    """One register tile: sum over `depth` of left (a scalar per row) times right (vectors)."""
    lanes = tile.lanes
    with T.sblock("tile"):
        sums = T.sblock_alloc_buffer((tile.mr * vectors * lanes,), "float32", scope="global")
        for at in range(tile.mr * vectors):
            store(sums, at * lanes, splat(0.0, lanes, "float32"), lanes, "float32")
        with T.serial(0, depth) as k:
            for i in range(tile.mr):
                for r in range(vectors):
                    at = (i * vectors + r) * lanes
                    added = load(sums, at, lanes, "float32") + spread(left(i, k), lanes) * right(k, r)
                    store(sums, at, added, lanes, "float32")
        for i in range(tile.mr):
            for r in range(vectors):
                write(i, r, load(sums, (i * vectors + r) * lanes, lanes, "float32"))


def _fold(buffer: Any, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Reduce the lanes of a vector, as a tree."""
    values = [buffer[lane] for lane in range(lanes)]
    while len(values) > 1:
        values = [combine(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _widen(value: Expr, dtype: str, lanes: int) -> Expr:
    if dtype == "float32":
        return value
    return value.astype(f"float32x{lanes}" if lanes > 1 else "float32")


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, bias: np.ndarray | None) -> np.ndarray:
    """What the kernel computes, over [b, n, h, d], with a float mask that is broadcast over [b, h, n, m]."""
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * scale + (0 if bias is None else bias)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), v)
