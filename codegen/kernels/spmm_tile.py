"""Sparse weights times dense rows: the register tile.

    Y[o, p] = sum over the blocks b of o's block row of values[b][o] * X[offsets[b] + p]

X has a row of elements for every input (a channel's pixels, a feature's tokens), anywhere: an input of the product is
known by where its row begins, so taps of a convolution are inputs like others, and a dense matrix is one whose blocks
are all kept. height x vectors accumulators stay in registers; each block loads `vectors` vectors of X once and uses
them for `height` outputs, whose weights are broadcast.
    limit: fma_per_cycle; two loads a cycle, so blocks of height 1 reach two thirds of it; the second-level cache
A row's last pixels, where they fill no vector, are multiplied for several outputs in one: with 4 pixels left over and
blocks of 4 outputs, the lanes of a vector are 4 x 4 results, and a block costs one multiply-add there in place of four.

Where the rows of X that a panel reads are too much for the first-level cache, they are taken in runs: all block rows
for the inputs of the first run, then for those of the next, which begin with the sums that the last one left. Sums lie
in scratch memory, a vector each, because vectors of Y may overlap, and because the epilogue is for whole sums only.
Where they are not, and the ISA has an instruction for it, those of a later block are fetched ahead.
Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, arXiv:1911.09723.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tvm import tirx
from tvm.tirx.script import builder as T

from graphopt.codegen.kernels.emit import Buffer, Expr, Registers, load, prefetch, shuffled, spread, store
from graphopt.cost.register_tile import registers
from graphopt.targets.target import Isa

HEIGHTS = (1, 2, 4, 8)
# The most vectors in a panel: past those, weights and offsets cost next to nothing.
MOST_VECTORS = 8


class Place(NamedTuple):
    """Where a vector begins in X and in Y, from its panel's beginning, and its elements."""

    source: int
    target: int
    elements: int


@dataclass(frozen=True)
class Panels:
    """`count` panels; panel k's vectors begin at k * step + each of `places`, in X and in Y."""

    count: int
    source_step: int
    target_step: int
    places: tuple[Place, ...]


def tail_of(width: int, height: int, lanes: int) -> int:
    """Elements of the last vector of `width` pixels, if it should have fewer than the others; else 0.

    A power of two, so that the results of the outputs of a block share vectors.
    """
    tail = 1 << (width % lanes - 1).bit_length() if width % lanes and width > lanes else lanes
    return tail if tail < lanes and tail_vectors(tail, height, lanes) < height else 0


def _sharing(elements: int, height: int, lanes: int) -> int:
    """Outputs whose `elements` results share a vector; none do in what is left over below the last whole block."""
    return min(height, lanes // elements) if height in HEIGHTS else 1


def tail_vectors(elements: int, height: int, lanes: int) -> int:
    """Vectors that hold `elements` results of each of `height` outputs."""
    return height // _sharing(elements, height, lanes)


def rows_of_pixels(height: int, width: int, pitch: int, lanes: int, most: int, tail: int = 0) -> tuple[Panels, ...]:
    """Panels of at most `most` vectors that cover an image whose rows are `pitch` apart in X and `width` in Y.

    The last vector of a row overlaps its predecessor, or has only `tail` elements; `lanes` <= `width`. An image without
    gaps is one long row.
    """
    if pitch == width:
        height, width = 1, height * width
    pixels = [(min(v * lanes, width - lanes), lanes) for v in range(-(-width // lanes))]
    if tail:
        pixels[-1] = (width - tail, tail)
    if height > 1 and len(pixels) <= most:
        together = max(1, most // len(pixels))
        whole, rest = divmod(height, together)
        shapes = [(0, whole, together)] + ([(whole * together, 1, rest)] if rest else [])
        return tuple(
            Panels(
                count,
                rows * pitch,
                rows * width,
                tuple(Place(y * pitch + x, y * width + x, n) for y in range(first, first + rows) for x, n in pixels),
            )
            for first, count, rows in shapes
            if count
        )
    # Panels of nearly equal widths: none runs with few accumulators only because it is what is left over.
    pieces = -(-len(pixels) // most)
    wide = len(pixels) % pieces or pieces
    size = -(-len(pixels) // pieces)
    sizes = [size] * wide + [size - 1] * (pieces - wide)
    panels, at = [], 0
    if height > 1:
        for each in sizes:
            panels.append(Panels(height, pitch, width, tuple(Place(x, x, n) for x, n in pixels[at : at + each])))
            at += each
        return tuple(panels)
    uneven = width % lanes != 0
    for each, count in ((size, wide), (size - 1, pieces - wide)):
        last = uneven and at + each * count == len(pixels)
        if count - last > 0:
            places = tuple(Place(x, x, n) for x, n in pixels[at : at + each])
            panels.append(Panels(count - last, each * lanes, each * lanes, places))
        if last and count:
            panels.append(Panels(1, 0, 0, tuple(Place(x, x, n) for x, n in pixels[-each:])))
        at += each * count
    return tuple(panels)


def most_vectors(height: int, isa: Isa) -> int:
    """Vectors of X whose accumulators, themselves and one weight fit the registers."""
    free = registers(isa) - (1 if isa.has_fma else 2)
    return max(1, min(MOST_VECTORS, free // (height + 1) if height > 1 else free // (1 if isa.has_fma else 2)))


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


@dataclass(frozen=True)
class Sums:
    """Where the sums of a block row lie from run to run: an accumulator of `lanes` elements each, from `start`."""

    buffer: Buffer
    start: Expr
    run: Expr
    runs: int


@dataclass(frozen=True)
class Weights:
    """A section's arrays, and the place in `ends` of the block row that is computed."""

    values: Buffer
    offsets: Buffer
    ends: Buffer
    row: Expr


def emit_block_row(
    x: Buffer,
    weights: Weights,
    tile: tuple[int, int, Isa],
    starts: Sequence[tuple[Expr, int]],
    finish: Callable[[int, int, Expr], None],
    sums: Sums | None = None,
    ahead: int = 0,
) -> None:
    """Emit one block row for one panel: clear, reduce, finish(output in the block, vector, result).

    `tile` is the height of blocks, the elements of a vector, and what it is written for; `starts` where vectors of X
    begin, and their elements. With `sums` it is one run of the inputs, and only the last one finishes. With `ahead`,
    what the block so many further on reads of X is fetched: `offsets` has that many more.
    """
    height, lanes, isa = tile
    starts = [(wide(start, isa), elements) for start, elements in starts]
    whole = [v for v, (_, elements) in enumerate(starts) if elements == lanes]
    tails = [v for v, (_, elements) in enumerate(starts) if elements < lanes]
    acc = Registers(height * len(whole), lanes, "float32")
    extra = {v: _tail_registers(starts[v][1], height, lanes) for v in tails}
    slots = [(acc, i) for i in range(len(acc))] + [(extra[v], i) for v in tails for i in range(len(extra[v]))]
    first = T.Bind(tirx.BufferLoad(weights.ends, [weights.row]))
    with T.serial(0, tirx.BufferLoad(weights.ends, [weights.row + 1]) - first) as n:
        block = T.Bind(first + n)
        at = T.Bind(wide(tirx.BufferLoad(weights.offsets, [block]), isa))
        value = T.Bind(wide(block, isa) * height)
        if ahead:
            later = T.Bind(wide(tirx.BufferLoad(weights.offsets, [block + ahead]), isa))
            for start, _ in starts:
                prefetch(x, later + start)
        # Before the others, which then find all other registers free.
        for v in tails:
            _tail_block(extra[v], (x, at + starts[v][0], starts[v][1]), weights.values, value)
        inputs = {v: load(x, at + starts[v][0], lanes, "float32") for v in whole}
        if height > 1:
            inputs = {v: T.Bind(value) for v, value in inputs.items()}
        weight_of = block_weights(weights.values, value, height, lanes, isa)
        for o in range(height if whole else 0):
            weight = weight_of(o)
            for i, v in enumerate(whole):
                acc[o * len(whole) + i] = acc[o * len(whole) + i] + weight * inputs[v]

    def end() -> None:
        for o in range(height):
            for i, v in enumerate(whole):
                finish(o, v, acc[o * len(whole) + i])
            for v in tails:
                finish(o, v, _tail_result(extra[v], o, starts[v][1]))

    if sums is None:
        end()
        return
    # In 64 bits, or LLVM would keep an index for each vector. Added last, for nothing waits for them there.
    begin = T.Bind(tirx.Cast("int64", sums.start))
    with T.If(sums.run > 0), T.Then():
        for n, (registers, i) in enumerate(slots):
            registers[i] = registers[i] + load(sums.buffer, begin + n * lanes, registers.lanes, "float32")
    with T.If(sums.run == sums.runs - 1):
        with T.Then():
            end()
        with T.Else():
            for n, (registers, i) in enumerate(slots):
                store(sums.buffer, begin + n * lanes, registers[i], registers.lanes, "float32")


def _tail_registers(elements: int, height: int, lanes: int) -> Registers:
    """Accumulators whose lanes are outputs x pixels."""
    shared = _sharing(elements, height, lanes)
    return Registers(height // shared, shared * elements, "float32")


def _tail_block(acc: Registers, source: tuple[Buffer, Expr, int], values: Buffer, start: Expr) -> None:
    """Add a block whose weights begin at `start` times a few pixels to accumulators of outputs x pixels.

    `source` is where the pixels lie: buffer, start, elements.
    """
    elements = source[2]
    outputs = acc.lanes // elements
    pixels = T.Bind(load(*source, "float32"))
    repeated = T.Bind(shuffled(pixels, elements, [n % elements for n in range(acc.lanes)]))
    for i in range(len(acc)):
        weights = T.Bind(load(values, start + i * outputs, outputs, "float32"))
        acc[i] = acc[i] + shuffled(weights, outputs, [n // elements for n in range(acc.lanes)]) * repeated


def _tail_result(acc: Registers, output: int, elements: int) -> Expr:
    """The pixels of one output."""
    outputs = acc.lanes // elements
    first = output % outputs * elements
    return shuffled(acc[output // outputs], acc.lanes, range(first, first + elements))
