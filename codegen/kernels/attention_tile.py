"""The register tile of attention: which one needs the fewest cycles, by count."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.targets.target import Target


@dataclass(frozen=True)
class Tile:
    """Sizes of the register tile and of the block of rows."""

    mr: int  # query rows in registers
    nv: int  # vectors across
    rows: int  # query rows whose scores are held at once, a multiple of mr
    lanes: int

    @property
    def nr(self) -> int:
        """Columns across."""
        return self.nv * self.lanes


def tile_for(n: int, m: int, d: int, target: Target) -> Tile:
    """The tile with the fewest cycles by count; the last block of rows starts earlier instead of being shorter."""
    lanes = target.isa.lanes(32)
    registers = target.isa.vector_registers
    shapes = [(6, 2), (5, 2), (4, 3), (4, 2), (3, 4)] if registers == 16 else [(8, 3), (12, 2), (6, 4), (6, 2)]
    best, least = Tile(1, 4, 1, lanes), math.inf
    for mr, nv in shapes if n > 1 else []:
        for tiles in range(1, 7):
            tile = Tile(min(mr, n), nv, min(mr, n) * tiles, lanes)
            if tile.rows > n or (tiles > 1 and tile.rows * m * 4 > target.l2_bytes // 8):
                continue
            rows = -(-n // tile.rows) * tile.rows
            # A panel is read from L2 once a block: some cycles for each of its vectors.
            cycles = (
                rows
                / tile.mr
                * sum(
                    depth * (_cycles(tile.mr, vectors, target) + vectors / tiles)
                    for width, depth in ((m, d), (d, m))
                    for _, vectors in panels(width, tile)
                )
            )
            if cycles < least:
                best, least = tile, cycles
    return best


def _cycles(mr: int, vectors: int, target: Target) -> float:
    """Cycles of one step of the register tile: arithmetic, latency or loads, whichever is longest."""
    isa = target.isa
    return max(mr * vectors / isa.fma_per_cycle, isa.fma_latency_cycles, (mr + vectors) / 2)


def panels(width: int, tile: Tile) -> list[tuple[int, int]]:
    """First column and vectors of each panel."""
    vectors = -(-width // tile.lanes)
    return [(v * tile.lanes, min(tile.nv, vectors - v)) for v in range(0, vectors, tile.nv)]
