"""How a product of a constant matrix with rows of pixels or tokens is computed (`spmm.py`), by estimates in cycles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphopt.codegen.dataflow import Array
from graphopt.codegen.kernels.conv2d import Window
from graphopt.codegen.kernels.planes import Planes, layouts
from graphopt.codegen.kernels.spmm_pack import blocks_of
from graphopt.codegen.kernels.spmm_tile import HEIGHTS, Panels, most_vectors, rows_of_pixels, tail_of, tail_vectors
from graphopt.cost.register_tile import ENGINE, LOADS_PER_CYCLE
from graphopt.targets.target import Isa, Target

# What comes from the second-level cache while blocks are multiplied, as they ask for it, and asked for ahead.
L2_BYTES_PER_CYCLE = 24
L2_BYTES_PER_CYCLE_AHEAD = 27
# Cycles of a block beside its work, and beside the latency of a multiply-add where few accumulators wait for it.
LOOP_CYCLES = 0.6
LATENCY_SLACK = 0.7
# Loads that start each cycle where every multiply-add has one.
LOADS_OF_PRODUCTS = 1.6
# Instruction sets whose prefetches pay where X is in the second-level cache, and from which height of blocks on: 1.0 to
# 1.13 times as fast on Zen 5. With lower blocks, which do little but load, they take more time than they save.
PREFETCHES = ("avx2", "avx512")
PREFETCHED_HEIGHT = 4
LINE_BYTES = 64
CACHE_SETS = 64
# Cycles of a block row beside its blocks: the end of its loop is mispredicted, results are stored.
ROW_CYCLES = 14.0
COPY_CYCLES = 2.5  # for each vector of X that is copied
# The share of the first-level cache that rows of X may fill; weights and results pass through the rest.
L1_SHARE = 0.87
MOST_RUNS = 16


@dataclass(frozen=True)
class Plan:
    """How a product is computed, and the estimate."""

    planes: Planes
    height: int
    lanes: int
    panels: tuple[Panels, ...]
    gaps: bool
    runs: int  # of inputs, so that a run's rows of X stay in the first-level cache
    prefetch: bool  # rows of X are asked for ahead
    cycles: float


def plan_of(matrix: Array, window: Window, target: Target) -> Plan:
    """The layout of X, the height of blocks, the width of panels and the runs with the lowest estimate."""
    pixels = math.prod(window.out)
    lanes = min(target.isa.lanes(), 1 << (pixels.bit_length() - 1))
    sizes = {h: (blocks_of(matrix, h), -(-len(matrix) // h)) for h in HEIGHTS if h == 1 or h <= len(matrix)}
    # Taps of a row of the kernel read the same lines but for a column or two.
    inputs = -(-int((matrix != 0).any(0).sum()) // window.kernel[1])
    plans = []
    for planes in layouts(window, lanes):
        copied = 0.0 if planes.direct else COPY_CYCLES * window.channels * planes.channel / lanes
        aligned = planes.channel % lanes == 0 and window.kernel[1] == 1
        for height, (blocks, block_rows) in sizes.items():
            for panels, gaps in _panels(planes, lanes, height, target.isa):
                vectors = (sum if gaps else max)(len(group.places) for group in panels)
                bytes_read = inputs * _cached(vectors * lanes * 4, planes.channel * 4)
                for runs in (1,) if gaps else _runs(bytes_read, target):
                    density = min(1.0, blocks / (block_rows * max(1, inputs)))
                    missed = _missed(bytes_read / runs, density, target)
                    product = Product(block_rows, blocks, height, lanes, runs, missed, inputs, aligned)
                    cycles = window.batch * (copied + product_cycles(product, panels, target))
                    ahead = missed > 0 and _asks_ahead(height, target.isa)
                    plans.append(Plan(planes, height, lanes, panels, gaps, runs, ahead, cycles))
    return min(plans, key=lambda plan: (plan.cycles, -plan.height))


def _panels(planes: Planes, lanes: int, height: int, isa: Isa) -> Iterator[tuple[tuple[Panels, ...], bool]]:
    """Ways to cut the pixels into panels, and whether they run over rows with the gaps between them."""
    rows, width = planes.window.out
    gaps = not planes.contiguous and width < lanes
    for most in range(1, most_vectors(height, isa) + 1):
        if gaps:
            span = -(-rows * planes.pitch // lanes) * lanes
            yield rows_of_pixels(1, span, span, lanes, most), True
            continue
        yield rows_of_pixels(rows, width, planes.pitch, lanes, most), False
        tail = tail_of(rows * width if planes.contiguous else width, height, lanes)
        if tail and isa.name not in ENGINE:
            panels = rows_of_pixels(rows, width, planes.pitch, lanes, most, tail)
            if all(_fits(group, height, lanes, isa) for group in panels):
                yield panels, False


def _fits(group: Panels, height: int, lanes: int, isa: Isa) -> bool:
    """Whether what the few pixels of a tail need beside accumulators fits the registers: weights, and their order."""
    full = sum(place.elements == lanes for place in group.places)
    shared = sum(tail_vectors(place.elements, height, lanes) for place in group.places if place.elements < lanes)
    return not shared or full * (height + 1) + shared + 4 <= isa.vector_registers


def _runs(bytes_read: int, target: Target) -> Sequence[int]:
    """Numbers of runs to weigh, where all inputs' elements of a panel are `bytes_read`."""
    runs = max(1, math.ceil(bytes_read / (L1_SHARE * target.l1d_bytes)))
    return (1,) if runs == 1 or runs > MOST_RUNS else (1, runs)


def _cached(size: int, stride: int) -> int:
    """Bytes of cache that `size` bytes of a row of X take, where rows are `stride` bytes apart.

    Rows whose distance has a large power of two share few of the cache's sets.
    """
    step = math.gcd(stride, CACHE_SETS * LINE_BYTES) if stride % LINE_BYTES == 0 else LINE_BYTES
    return -(-size // step) * step


def _missed(bytes_read: float, density: float, target: Target) -> float:
    """The share of X's lines that come from the second-level cache: none where a panel of a run fits the first.

    Where it does not, nothing is left of lines that each block row reads again; the fewer it reads, the more is: fitted
    to Zen 5, for panels of 1.5 to 18 times what fits.
    """
    fits = L1_SHARE * target.l1d_bytes
    return 0.0 if bytes_read <= fits else 1 - (1 - density) ** 1.5 * (fits / bytes_read) ** 0.4


@dataclass(frozen=True)
class Product:
    """What the estimate depends on."""

    block_rows: int
    blocks: int
    height: int
    lanes: int
    runs: int
    missed: float
    inputs: int  # rows of X that are read
    aligned: bool


def block_cycles(product: Product, full: int, tails: Sequence[int], isa: Isa) -> float:
    """Estimate for one block: arithmetic, loads, and what the first-level cache misses of X.

    `full` vectors, and `tails` with so many elements. Of vectors that do not begin at their boundaries, some touch two
    cache lines: with 64 bytes nearly all of them do.
    """
    height = product.height
    shared = sum(tail_vectors(elements, height, product.lanes) for elements in tails)
    arithmetic = (height * full + shared) * (1 if isa.has_fma else 2) / isa.fma_per_cycle
    lines = full * (1.0 if product.aligned else 1 + isa.vector_bits / 8 / LINE_BYTES)
    per_cycle = LOADS_PER_CYCLE if height > 1 else LOADS_OF_PRODUCTS
    loads = (1 + (height if full else 0) + lines + len(tails) + shared) / per_cycle
    rate = L2_BYTES_PER_CYCLE_AHEAD if _asks_ahead(height, isa) and not product.aligned else L2_BYTES_PER_CYCLE
    far = product.missed * _touched(product, full) * isa.vector_bits / 8 / rate
    return max(arithmetic, isa.fma_latency_cycles + LATENCY_SLACK, loads, far) + LOOP_CYCLES


def _asks_ahead(height: int, isa: Isa) -> bool:
    """Whether rows of X are asked for before they are used, where they come from the second-level cache."""
    return height >= PREFETCHED_HEIGHT and isa.name in PREFETCHES


def _touched(product: Product, full: int) -> int:
    """Vectors' worth of lines that `full` vectors touch: of neighbours, one ends in the line the other begins in."""
    return full if product.aligned else full + 1


def product_cycles(product: Product, panels: Sequence[Panels], target: Target) -> float:
    """Estimate for all panels."""
    total, isa, height = 0.0, target.isa, product.height
    for group in panels:
        tails = [place.elements for place in group.places if place.elements < product.lanes]
        full = len(group.places) - len(tails)
        row = ROW_CYCLES + height * len(group.places)
        rows = product.block_rows * (row + (product.runs - 1) * (row + height * full))
        first = product.inputs * _touched(product, full) * isa.vector_bits / 8 / L2_BYTES_PER_CYCLE
        once = 0.0 if product.missed else first
        total += group.count * (product.blocks * block_cycles(product, full, tails, isa) + rows + once)
    return total
