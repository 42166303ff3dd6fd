"""The register tile of dense kernels: which tiles there are, and how many cycles a product takes with one.

mr x nr accumulators stay in registers; each step of the reduction broadcasts mr elements of A and loads nr of B, and
does mr * nr multiply-adds. The last tile of rows and the last panel of columns overlap their predecessors, so a product
costs as much as one whose sizes are multiples of the tile's. Code generation chooses its tiles by this estimate, and
`LatencyModel` says by it what a size costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from graphopt.targets.target import Isa

LOADS_PER_CYCLE = 2
L2_BYTES_PER_CYCLE = 24


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the accumulators, and elements of one vector."""

    mr: int
    nr: int
    lanes: int

    @property
    def vectors(self) -> int:
        """Vectors in a row of the tile."""
        return self.nr // self.lanes

    def __str__(self) -> str:
        return f"{self.mr}x{self.nr}"


# Instruction sets whose registers an engine assigns when the program is loaded.
ENGINE = ("simd128", "relaxed-simd")


def registers(isa: Isa) -> int:
    """Vector registers that a tile may fill.

    WebAssembly has none; an engine lays locals out in the processor's and keeps some to itself. Measured in Node 20 on
    x86-64: 4 x 8 runs at 32 GFLOP/s (41 with relaxed SIMD), 6 x 8 and 4 x 16 at 20.
    """
    return 12 if isa.name in ENGINE else isa.vector_registers


def tiles(m: int, n: int, isa: Isa, bits: int = 32) -> Iterator[Tile]:
    """Tiles whose accumulators, one row of W and one element of A fit the registers."""
    lanes = min(isa.lanes(bits), 1 << (n.bit_length() - 1))
    temporaries = 1 if isa.has_fma else 2
    # More rows than ways of the first-level cache evict each other where their distance is a power of two; fewer than
    # three use what is loaded too little.
    least, most = min(m, 3), 6 if isa.name in ENGINE else 8
    while lanes >= 1:
        for vectors in range(1, min(8, n // lanes) + 1):
            for mr in range(least, min(m, most) + 1):
                # A row of W that is used once needs no register: it is an operand in memory.
                held = vectors if mr > 1 else 0
                if mr * vectors + held + temporaries <= registers(isa):
                    yield Tile(mr, vectors * lanes, lanes)
        lanes //= 2


def cycles(m: int, n: int, tile: Tile, isa: Isa) -> float:
    """Estimate per step of t for the whole product."""
    accumulators = tile.mr * tile.vectors
    arithmetic = accumulators * (1 if isa.has_fma else 2) / isa.fma_per_cycle
    # Measured on Zen 4: with few accumulators the units run dry between steps, and each row of A is one more stream
    # that competes for the ways of the first-level cache.
    arithmetic *= 1 + 2 / accumulators
    loads = (tile.mr + tile.vectors) / LOADS_PER_CYCLE
    # A panel of W is longer than the first-level cache: it comes from the second with each tile.
    stream = tile.vectors * isa.vector_bits // 8 / L2_BYTES_PER_CYCLE
    each = max(arithmetic, loads, stream, isa.fma_latency_cycles) + 0.08 * tile.mr + 0.1 * tile.vectors
    return -(-m // tile.mr) * -(-n // tile.nr) * each


@lru_cache(maxsize=1 << 16)
def best_tile(m: int, n: int, isa: Isa, bits: int = 32) -> Tile:
    """The tile with the lowest estimate."""
    return min(tiles(m, n, isa, bits), key=lambda t: (cycles(m, n, t, isa), -t.mr * t.nr))
