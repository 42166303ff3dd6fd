"""Sparse weights times dense rows: the register tile, and the loops around it.

    Y[o, p] = sum over the blocks b of o's block row of values[b][o] * X[offsets[b] + p]

X has a row of elements for every input (a channel's pixels, a feature's tokens), anywhere: an input of the product is
known by where its row begins, so taps of a convolution are inputs like others, and a dense matrix is one whose blocks
are all kept. height x vectors accumulators stay in registers; each block loads `vectors` vectors of X once and uses
them for `height` outputs, whose weights are broadcast.
    limit: fma_per_cycle; two loads a cycle, so blocks of height 1 reach about half of it; the second-level cache
Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, arXiv:1911.09723.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tvm import tirx
from tvm.tirx.script import builder as T

from graphopt.codegen.kernels.emit import Buffer, Expr, Registers, load, spread
from graphopt.cost.register_tile import LOADS_PER_CYCLE, registers
from graphopt.targets.target import Isa, Target

HEIGHTS = (1, 2, 4, 8)
L2_BYTES_PER_CYCLE = 40
LINE_BYTES = 64
# Cycles of a block row beside its blocks: the end of its loop is mispredicted, results are stored.
ROW_CYCLES = 14.0


@dataclass(frozen=True)
class Panels:
    """`count` panels; panel k's vectors begin at k * step + each of `places`, in X and in Y."""

    count: int
    source_step: int
    target_step: int
    places: tuple[tuple[int, int], ...]


def rows_of_pixels(height: int, width: int, pitch: int, lanes: int, most: int) -> tuple[Panels, ...]:
    """Panels of at most `most` vectors that cover an image whose rows are `pitch` apart in X and `width` in Y.

    The last vector of a row overlaps its predecessor; `lanes` <= `width`. An image without gaps is one long row.
    """
    if pitch == width:
        height, width = 1, height * width
    starts = [min(v * lanes, width - lanes) for v in range(-(-width // lanes))]
    if height > 1 and len(starts) <= most:
        together = max(1, most // len(starts))
        whole, rest = divmod(height, together)
        shapes = [(0, whole, together)] + ([(whole * together, 1, rest)] if rest else [])
        return tuple(
            Panels(
                count,
                rows * pitch,
                rows * width,
                tuple(((first + r) * pitch + s, (first + r) * width + s) for r in range(rows) for s in starts),
            )
            for first, count, rows in shapes
            if count
        )
    # Panels of nearly equal widths: none runs with few accumulators only because it is what is left over.
    pieces = -(-len(starts) // most)
    wide = len(starts) % pieces or pieces
    size = -(-len(starts) // pieces)
    sizes = [size] * wide + [size - 1] * (pieces - wide)
    panels, at = [], 0
    if height > 1:
        for each in sizes:
            places = tuple((s, s) for s in starts[at : at + each])
            panels.append(Panels(height, pitch, width, places))
            at += each
        return tuple(panels)
    uneven = width % lanes != 0
    for each, count in ((size, wide), (size - 1, pieces - wide)):
        last = uneven and at + each * count == len(starts)
        if count - last > 0:
            places = tuple((at * lanes + v * lanes,) * 2 for v in range(each))
            panels.append(Panels(count - last, each * lanes, each * lanes, places))
        if last and count:
            panels.append(Panels(1, 0, 0, tuple((s, s) for s in starts[-each:])))
        at += each * count
    return tuple(panels)


def most_vectors(height: int, isa: Isa) -> int:
    """Vectors of X whose accumulators, themselves and one weight fit the registers."""
    free = registers(isa) - (1 if isa.has_fma else 2)
    return max(1, min(8, free // (height + 1) if height > 1 else free // (1 if isa.has_fma else 2)))


@lru_cache(maxsize=1 << 14)
def block_cycles(height: int, vectors: int, isa: Isa, panel_bytes: int, l1d_bytes: int, aligned: bool = True) -> float:
    """Estimate for one block: arithmetic, loads, and X from the second-level cache where a panel of it is too large.

    Of vectors that do not begin at their boundaries, some touch two cache lines: with 64 bytes nearly all of them do.
    """
    products = height * vectors
    arithmetic = max(products * (1 if isa.has_fma else 2) / isa.fma_per_cycle, float(isa.fma_latency_cycles))
    lines = vectors * (1.0 if aligned else 1 + isa.vector_bits / 8 / LINE_BYTES)
    loads = (1 + height + lines) / LOADS_PER_CYCLE
    far = lines * isa.vector_bits / 8 / L2_BYTES_PER_CYCLE if panel_bytes > 0.8 * l1d_bytes else 0.0
    return max(arithmetic, loads, far) + 0.3


def product_cycles(
    block_rows: int,
    blocks: int,
    height: int,
    panels: Sequence[Panels],
    inputs: int,
    aligned: bool,
    target: Target,
) -> float:
    """Estimate for a section: `blocks` blocks in `block_rows` rows, for all panels; `inputs` rows of X are read."""
    total = 0.0
    for group in panels:
        vectors = len(group.places)
        panel_bytes = inputs * vectors * target.isa.vector_bits // 8
        each = block_cycles(height, vectors, target.isa, panel_bytes, target.l1d_bytes, aligned)
        total += group.count * (blocks * each + block_rows * (ROW_CYCLES + height * vectors))
    return total


def wide(index: Expr, isa: Isa) -> Expr:
    """An index in as many bits as addresses have, where LLVM would extend it anew for each block."""
    return tirx.Cast("int64", index) if isa.name == "neon" else index


def block_weights(values: Buffer, start: Expr, height: int, lanes: int, isa: Isa) -> Callable[[int], Expr]:
    """The weights of a block that begin at `start`: a function that emits the one of an output, in every lane.

    NEON multiplies with a lane of a register: there, four weights are one load.
    """
    if isa.name != "neon" or lanes != isa.lanes() or height % lanes:
        return lambda o: T.Bind(spread(load(values, start + o, 1, "float32"), lanes))
    fours = [T.Bind(load(values, start + first, lanes, "float32")) for first in range(0, height, lanes)]
    return lambda o: tirx.Shuffle([fours[o // lanes]], [tirx.IntImm("int32", o % lanes)] * lanes)


def emit_block_row(
    x: Buffer,
    values: Buffer,
    offsets: Buffer,
    ends: Buffer,
    row: Expr,
    tile: tuple[int, int, Isa],
    starts: Sequence[Expr],
    finish: Callable[[int, int, Expr], None],
) -> None:
    """Emit one block row for one panel: clear, reduce, finish(output in the block, vector, result).

    `tile` is the height of blocks, the elements of a vector, and what it is written for.
    """
    height, lanes, isa = tile
    vectors = len(starts)
    acc = Registers(height * vectors, lanes, "float32")
    first = T.Bind(tirx.BufferLoad(ends, [row]))
    starts = [wide(start, isa) for start in starts]
    with T.serial(0, tirx.BufferLoad(ends, [row + 1]) - first) as n:
        block = T.Bind(first + n)
        at = T.Bind(wide(tirx.BufferLoad(offsets, [block]), isa))
        inputs = [load(x, at + start, lanes, "float32") for start in starts]
        if height > 1:
            inputs = [T.Bind(value) for value in inputs]
        weights = block_weights(values, wide(block, isa) * height, height, lanes, isa)
        for o in range(height):
            weight = weights(o)
            for v in range(vectors):
                acc[o * vectors + v] = acc[o * vectors + v] + weight * inputs[v]
    for o in range(height):
        for v in range(vectors):
            finish(o, v, acc[o * vectors + v])
