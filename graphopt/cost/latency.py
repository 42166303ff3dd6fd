"""An estimate of latency by target: per kernel the larger of arithmetic and bytes, and the cost of the call.

Extents are rounded up to what kernels do: register tiles on vector units (`register_tile`), tiles of blocks on GPUs.
Nothing is measured here, so the estimate is the same everywhere; `LatencyTable` measures, and corrects it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.fx import Node

from graphopt.axes import Axes, Axis
from graphopt.cost.model import CostModel, cost_model
from graphopt.cost.polynomial import Compiled, Polynomial, Sizes, sizes_of
from graphopt.cost.register_tile import L2_BYTES_PER_CYCLE, best_tile, cycles
from graphopt.cost.work import Work, works
from graphopt.targets.speed import Speed, speed_of
from graphopt.targets.target import Isa, Target

# Measured on Zen 4 with AVX2 on kernels of one operator, as are the other numbers here: cycles for each vector of what
# takes more than additions; the softmax within attention is cheaper than one on its own.
_VECTOR_CYCLES = {
    "gelu": 20, "silu": 14, "mish": 24, "sigmoid": 12, "tanh": 14, "exp": 10, "erf": 16, "log": 12, "softmax": 18,
    "_softmax": 18, "log_softmax": 20, "_log_softmax": 20, "softplus": 20, "glu": 14, "elu": 12, "sin": 14, "cos": 14,
}  # fmt: skip
_SOFTMAX_CYCLES = 12
# Other FLOPs that a vector unit does per cycle, as a share of its multiply-adds; in pools, whose windows overlap.
_PLAIN_SHARE, _POOL_SHARE = 0.25, 0.06
# Bytes per cycle where elements change places.
_MOVED_BYTES_PER_CYCLE = 8
# Cycles per tap of a depthwise convolution, and per vector of its results.
_TAP_CYCLES, _STRIP_CYCLES = 2.0, 4.0
# What the start and the end of a register tile cost besides its reduction: clearing, epilogue, stores; the loops over a
# window, and copying what it sees into its padding.
_TILE_CYCLES, _WINDOW_CYCLES = 14, 60
# A block of a GPU's matrix products: rows and columns, or more where there is enough to do.
_BLOCKS = ((32, 64), (64, 128))
# What matrix products without tensor cores reach of a GPU's peak.
_GPU_SHARE = 0.5


@dataclass(frozen=True)
class Machine:
    """A target, its speed, and how many threads a run has."""

    target: Target
    speed: Speed
    threads: int = 1

    def seconds(self, work: Work, extents: Sequence[int], *, spilled: bool = False) -> float:
        """How long one call takes with these extents, those of `work`; `spilled`: its weights come from memory."""
        *loops, moved, held = extents
        if self.target.kind == "cuda":
            return self._gpu(work, loops, moved + held)
        isa, clock = self.target.isa, self.speed.clock_hz
        if work.kind == "product":
            batch, m, n, k = loops
            arithmetic = batch * _product(m, n, k, isa, work.bits)
        elif work.kind == "conv":
            pixels, inputs, outputs, own, taps = loops
            groups = max(1, inputs // own)
            if own == 1 and groups == outputs:
                arithmetic = _depthwise(pixels, outputs, taps, isa, work.bits)
            else:
                each = _WINDOW_CYCLES if taps > 1 else 0
                arithmetic = groups * _product(pixels, outputs // groups, own * taps, isa, work.bits, each)
        elif work.kind == "attention":
            heads, queries, keys, dim, values = loops
            softmax = queries * _up(keys, isa.lanes()) / isa.lanes() * _SOFTMAX_CYCLES
            both = _product(queries, keys, dim, isa) + _product(queries, values, keys, isa)
            arithmetic = heads * (both + softmax)
        else:
            arithmetic = self._plain(work.op, *loops)
        arithmetic /= self._workers(arithmetic)
        cache = moved / (_MOVED_BYTES_PER_CYCLE if work.kind == "stream" and not loops[0] else L2_BYTES_PER_CYCLE)
        memory = held / self.speed.memory_bytes_per_second if spilled else 0.0
        if moved > self.target.l2_bytes:
            memory += moved / self.speed.memory_bytes_per_second
        call = 0.0 if work.kind == "fused" else self.speed.call_seconds
        return max(arithmetic / clock, cache / clock, memory) + call

    def _plain(self, op: str, flops: int, elements: int) -> float:
        """Cycles of what is no product."""
        isa = self.target.isa
        if op in _VECTOR_CYCLES:
            return elements / isa.lanes() * _VECTOR_CYCLES[op]
        share = _POOL_SHARE if "_pool" in op else _PLAIN_SHARE
        return flops / (2 * isa.lanes() * isa.fma_per_cycle * share)

    def _workers(self, arithmetic: float) -> float:
        """Threads that share a kernel; waking them must pay."""
        return max(1.0, min(self.threads, arithmetic / 20_000)) if self.target.threads else 1.0

    def _gpu(self, work: Work, loops: Sequence[int], moved: int) -> float:
        speed = self.speed
        peak = speed.peak_flops * _GPU_SHARE
        if work.kind in ("stream", "fused"):
            flops = loops[0] * 2.0
        else:
            if work.kind == "product":
                batch, m, n, k = loops
                parts = [(batch, m, n, k)]
            elif work.kind == "conv":
                pixels, inputs, outputs, own, taps = loops
                groups = max(1, inputs // own)
                parts = [(groups, pixels, outputs // groups, own * taps)]
            else:
                heads, queries, keys, dim, values = loops
                parts = [(heads, queries, keys, dim), (heads, queries, values, keys)]
            flops = 0.0
            for batch, m, n, k in parts:
                rows, columns = _BLOCKS[batch * m * n >= 100 * math.prod(_BLOCKS[1])]
                blocks = batch * -(-m // rows) * -(-n // columns)
                # Whole waves of blocks, one for each multiprocessor.
                flops += 2.0 * _up(blocks, speed.multiprocessors) * rows * columns * k
        call = 0.0 if work.kind == "fused" else speed.call_seconds
        return max(flops / peak, moved / speed.memory_bytes_per_second) + call


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@lru_cache(maxsize=1 << 16)
def _product(m: int, n: int, k: int, isa: Isa, bits: int = 32, each: int = 0) -> float:
    """Cycles of an m x n x k product in register tiles, each with so many more; halves are computed as float32."""
    tile = best_tile(m, n, isa, 64 if bits == 64 else 32)
    tiles = -(-m // tile.mr) * -(-n // tile.nr)
    return cycles(m, n, tile, isa) * k + tiles * (_TILE_CYCLES + each + tile.mr * tile.vectors)


def _depthwise(pixels: int, channels: int, taps: int, isa: Isa, bits: int = 32) -> float:
    """Cycles of a convolution in which each channel is on its own, channels in vectors."""
    lanes = isa.lanes(64 if bits == 64 else 32)
    return pixels * _up(channels, lanes) / lanes * (taps * _TAP_CYCLES * (1.0 if isa.has_fma else 1.5) + _STRIP_CYCLES)


@dataclass(frozen=True, eq=False)
class Grid:
    """Seconds measured at a grid of extents: `points[i]` are ascending values of `coordinates[i]`.

    `seconds` has a dimension for each coordinate. Between points it is multilinear, beyond them as at the nearest.
    """

    coordinates: tuple[Polynomial, ...]
    points: tuple[tuple[int, ...], ...]
    seconds: NDArray[np.float64]

    def at(self, extents: Sequence[int]) -> float:
        """Seconds at the extents of the coordinates; what was measured where they are points."""
        corner = self.seconds
        for extent, points in zip(extents, self.points, strict=True):
            above = min(max(bisect.bisect_left(points, extent), 1), len(points) - 1) if len(points) > 1 else 0
            low, high = points[max(above - 1, 0)], points[above]
            share = min(max((extent - low) / (high - low), 0.0), 1.0) if high > low else 1.0
            below = corner[max(above - 1, 0)]
            corner = (
                corner[above] if share == 1.0 else below if share == 0.0 else below + share * (corner[above] - below)
            )
        return float(corner)


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Seconds per run of a program on a target, by the extents of its axes; those left out are whole.

    `factor` corrects the estimate. Calls in `measured` take what their grid says instead.
    """

    cost: CostModel
    machine: Machine
    factor: float = 1.0
    measured: Mapping[Node, Grid] = field(default_factory=dict)
    _known: dict[tuple[int, ...], float] = field(default_factory=dict)

    @cached_property
    def works(self) -> tuple[Work, ...]:
        """What is estimated: a call each."""
        return works(self.cost.axes.program, self.cost.shapes)

    @cached_property
    def _compiled(self) -> tuple[Compiled, list[tuple[int, int]]]:
        polynomials, ranges = [self.cost.total["stored_bytes"]], []
        for work in self.works:
            grid = self.measured.get(work.node)
            own = work.extents if grid is None else grid.coordinates
            ranges.append((len(polynomials), len(polynomials) + len(own)))
            polynomials += own
        return Compiled(polynomials, self.cost.variables), ranges

    @property
    def variables(self) -> tuple[Axis, ...]:
        """The axes that it depends on."""
        return self.cost.variables

    def __call__(self, sizes: Sizes | None = None) -> float:
        """Seconds per run where axes have these sizes. Raises ValueError as `CostModel.at`."""
        return sum(seconds for _, seconds in self.rows(sizes))

    def rows(self, sizes: Sizes | None = None) -> list[tuple[Work, float]]:
        """Seconds of each call. Those that are computed in the kernel of another count what they add to it."""
        compiled, _ = self._compiled
        return self._rows(compiled(compiled.sizes(sizes_of(sizes or {}))).tolist())

    def many(self, sizes: ArrayLike, variables: Sequence[Axis] | None = None) -> NDArray[np.float64]:
        """Seconds at many sizes: (k, variables) to (k,). The columns are `variables`, by default the model's own."""
        compiled, _ = self._compiled
        rows = np.asarray(sizes, np.int64)
        if variables is not None:
            places = {axis: place for place, axis in enumerate(variables)}
            whole = np.repeat(compiled.full[None], len(rows), 0)
            for place, axis in enumerate(compiled.variables):
                if axis in places:
                    whole[:, place] = rows[:, places[axis]]
            rows = whole
        return np.array([sum(s for _, s in self._rows(values)) for values in compiled(rows).tolist()], np.float64)

    def _rows(self, values: list[int]) -> list[tuple[Work, float]]:
        spilled = values[0] > self.machine.target.l2_bytes
        found = []
        for place, (work, (start, stop)) in enumerate(zip(self.works, self._compiled[1], strict=True)):
            key = (place, spilled, *values[start:stop])
            seconds = self._known.get(key)
            if seconds is None:
                grid = self.measured.get(work.node)
                if grid is None:
                    seconds = self.machine.seconds(work, values[start:stop], spilled=spilled) * self.factor
                else:
                    seconds = grid.at(values[start:stop])
                self._known[key] = seconds
            found.append((work, seconds))
        return found

    def corrected(self, measured_seconds: float) -> LatencyModel:
        """The same, scaled so that the program as it is takes what was measured.

        Args:
            measured_seconds: of the program as it is, on the target and with its threads.
        """
        scale = measured_seconds / self()
        grids = {node: replace(grid, seconds=grid.seconds * scale) for node, grid in self.measured.items()}
        return replace(self, factor=self.factor * scale, measured=grids, _known={})


def latency_model(axes: Axes, target: Target, *, threads: int = 1, speed: Speed | None = None) -> LatencyModel:
    """Estimate the latency of `axes.program` on a target as a function of sizes.

    Args:
        threads: that a run may use, where the target has threads.
        speed: of the target, where it is known better than `speed_of` knows it.
    """
    return LatencyModel(cost_model(axes), Machine(target, speed or speed_of(target), threads))


def alignment(target: Target, role: str = "") -> int:
    """The multiple that an axis of a role should keep, in items: shorter ones cost as much as the next multiple.

    Channels, neurons and embeddings are columns of register tiles, and whole vectors; heads, groups of them and experts
    are counted out by loops, so any number does.
    """
    if role in ("head", "query_group", "expert", "token"):
        return 1
    if target.kind == "cuda":
        return 8 if role == "head_dim" else 16
    return target.isa.lanes()
