"""Vectors of an image's columns as one tap of a filter sees them, zeros (or another value) beyond the image.

    value[n] = X[line, (left + n) sx + j dx - pad]      n < lanes, for one channel

In place: a vector that reaches over an edge is loaded from inside and shifted in registers, zeros coming in; every
second column is picked from two vectors, or loaded apart from those between where one instruction does that. Or from a
padded copy (`planes.py`), whatever the strides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.tirx.script import builder as T

from graphopt.codegen.kernels.conv2d import Window
from graphopt.codegen.kernels.emit import Buffer, Expr, load, splat, spread
from graphopt.codegen.kernels.planes import Planes
from graphopt.targets.target import Isa

ROWS = 4  # of results at once


def loads_pairs(lanes: int, isa: Isa) -> bool:
    """Whether even and odd elements of a run are loaded into two vectors at once (NEON's ld2)."""
    return isa.name == "neon" and lanes == isa.lanes()


class Taps(Protocol):
    """Where a channel's columns come from."""

    def lines(self, rows: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """The padded rows that `rows` rows of results read, and for each the (result row, tap row) that want it."""

    def inside(self, side: int, start: int, count: int) -> bool:
        """Whether rows (side 0) or columns (1) of results from `start` on see nothing beyond the image."""

    def load(self, top: Expr, line: int, left: Expr, j: int) -> Expr | None:
        """The vector that tap column `j` sees, from result column `left` on, `line` padded rows below result row `top`.

        None where all of it lies beyond the image. `top` and `left` are numbers where `inside` says no.
        """


@dataclass(frozen=True)
class CopiedTaps:
    """From padded planes that begin at `start`."""

    planes: Planes
    source: Buffer
    start: Expr
    lanes: int

    def lines(self, rows: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """See Taps."""
        return _lines(self.planes.window, rows)

    def inside(self, side: int, start: int, count: int) -> bool:
        """See Taps."""
        return True

    def load(self, top: Expr, line: int, left: Expr, j: int) -> Expr | None:
        """See Taps."""
        g, p = self.planes.window, self.planes
        (row, py), (column, px) = divmod(line, g.strides[0]), divmod(j * g.dilation[1], g.strides[1])
        at = p.phases.index((py, px)) * p.plane + (top + row) * p.pitch + column + left
        return load(self.source, self.start + at, self.lanes, "float32")


def readable(g: Window, lanes: int) -> bool:
    """Whether `ImageTaps` can read this geometry."""
    reach = (g.kernel[1] - 1) * g.dilation[1]
    ends = (g.out[1] - 1) * g.strides[1] + reach - g.padding[1] - g.width + 1  # columns beyond the right edge
    if g.strides[1] == 1:
        return g.width >= lanes and max(g.padding[1], ends) < lanes
    # Behind the right edge the second of two vectors would have to be cut; in front one element at most is missing.
    return g.strides[1] == 2 and g.width >= 2 * lanes and g.padding[1] <= 1 and ends <= 0 and g.width % 2 == 0


@dataclass(frozen=True)
class ImageTaps:
    """From the image itself, whose channel begins at `start`."""

    window: Window
    source: Buffer
    start: Expr
    lanes: int
    fill: float = 0.0  # what lies beyond the image
    pairs: bool = False  # `loads_pairs`

    def lines(self, rows: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """See Taps."""
        return _lines(self.window, rows)

    def inside(self, side: int, start: int, count: int) -> bool:
        """See Taps."""
        g = self.window
        size, stride = (g.width if side else g.height), g.strides[side]
        low = start * stride - g.padding[side]
        high = low + (count - 1) * stride + (g.kernel[side] - 1) * g.dilation[side]
        # Of pairs the second vector may end an element behind the last that is wanted.
        return low >= 0 and high + (stride - 1 if side else 0) < size

    def load(self, top: Expr, line: int, left: Expr, j: int) -> Expr | None:
        """See Taps."""
        g = self.window
        y = top * g.strides[0] + (line - g.padding[0])
        if isinstance(y, int) and not 0 <= y < g.height:
            return None
        row = self.start + y * g.width
        column = left * g.strides[1] + (j * g.dilation[1] - g.padding[1])
        if g.strides[1] == 1:
            return self._run(row, column)
        value = None
        if self.pairs and g.kernel[1] > 1:
            value = self._of_both(row, left * 2 - g.padding[1], j * g.dilation[1])
        return self._pair(row, column) if value is None else value

    def _run(self, row: Expr, column: Expr) -> Expr | None:
        """Neighbouring columns."""
        lanes, width = self.lanes, self.window.width
        if not isinstance(column, int) or 0 <= column <= width - lanes:
            return load(self.source, row + column, lanes, "float32")
        if column <= -lanes or column >= width:
            return None
        inner = min(max(column, 0), width - lanes)
        return shifted(load(self.source, row + inner, lanes, "float32"), column - inner, lanes, self.fill)

    def _pair(self, row: Expr, column: Expr) -> Expr:
        """Every second column."""
        lanes, width = self.lanes, self.window.width
        first, odd, shift = column, 0, 0
        if isinstance(column, int):
            if column < 0:
                first, odd, shift = column + 1, 1, -1
            elif column + 2 * lanes > width:
                first, odd = column - 1, 1
        pair = [T.Bind(load(self.source, row + first + k * lanes, lanes, "float32")) for k in (0, 1)]
        picked = tirx.Shuffle(pair, [tirx.IntImm("int32", 2 * n + odd) for n in range(lanes)])
        return shifted(picked, shift, lanes, self.fill) if shift else picked

    def _of_both(self, row: Expr, first: Expr, offset: int) -> Expr | None:
        """Every second column from `first` + `offset`: picked from one load for all taps, an element behind it added.

        None for taps that are too far from the first for that.
        """
        lanes = self.lanes
        if isinstance(first, int) and first < 0:
            first, offset = first + 1, offset - 1
        if offset > 3:
            return None
        both = T.Bind(load(self.source, row + first, 2 * lanes, "float32"))
        picked = tirx.Shuffle([both], [tirx.IntImm("int32", 2 * n + offset % 2) for n in range(lanes)])
        if offset < 0:
            return shifted(picked, -1, lanes, self.fill)
        if offset < 2:
            return picked
        picked, following = T.Bind(picked), load(self.source, row + first + (2 * lanes + offset - 2), 1, "float32")
        return tirx.Shuffle([picked, spread(following, lanes)], [tirx.IntImm("int32", n + 1) for n in range(lanes)])


def shifted(value: Expr, by: int, lanes: int, fill: float = 0.0) -> Expr:
    """result[n] = value[n + by], `fill` where that is outside."""
    value, around = T.Bind(value), T.Bind(splat(fill, lanes, "float32"))
    if by < 0:
        return tirx.Shuffle([around, value], [tirx.IntImm("int32", lanes + by + n) for n in range(lanes)])
    return tirx.Shuffle([value, around], [tirx.IntImm("int32", by + n) for n in range(lanes)])


def _lines(g: Window, rows: int) -> list[tuple[int, list[tuple[int, int]]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for r in range(rows):
        for i in range(g.kernel[0]):
            found.setdefault(r * g.strides[0] + i * g.dilation[0], []).append((r, i))
    return sorted(found.items())


def each(size: int, step: int, inside: Callable[[int], bool], body: Callable[[Expr], None]) -> None:
    """Call `body` at 0, step, ..., the last one overlapping; a run of those that are `inside` is one loop."""
    starts = [min(n, size - step) for n in range(0, size, step)]
    plain = [n for n, start in enumerate(starts) if start == n * step and inside(start)]
    # The longest run of neighbours.
    first = plain[0] if plain else len(starts)
    last = first
    while last < len(starts) and last in plain:
        last += 1
    if last - first < 2:
        first = last = len(starts)
    for start in starts[:first]:
        body(start)
    if last > first:
        with T.serial(0, last - first) as n:
            body(T.Bind((n + first) * step))
    for start in starts[last:]:
        body(start)
