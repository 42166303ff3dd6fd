"""Weights with zeros, packed for `spmm_tile.py`: block rows, each a list of values and of where their inputs lie.

    section   rows in blocks of `height` outputs; a matrix whose height is no multiple has a second section
    values    (blocks, height): the weights of one input, for the outputs of the block row
    offsets   (blocks + AHEAD,) int32: where that input's elements begin, in elements; the last are only prefetched
    ends      (runs, block rows + 1) int32: block row r has in run k the blocks from ends[k, r] to ends[k, r + 1]
    outputs   (block rows,) int32: the first output of each block row

Blocks of any format are packed at the height that is fastest: an element that is zero in a kept block is multiplied
like the others. Block rows are sorted by length, so that the processor predicts where their loops end. Inputs may be
cut into runs, each with its blocks of all block rows: a run's part of X stays in the first-level cache.
Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, arXiv:1911.09723. Differs: rows are sorted, offsets absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.codegen.dataflow import Array

# So many blocks before one is multiplied, its inputs are fetched. On Zen 5 16 are better than 8, and 8 than 4.
AHEAD = 16


@dataclass(frozen=True)
class Section:
    """What is packed of consecutive outputs, at one height of blocks."""

    height: int
    values: Array
    offsets: Array
    ends: Array
    outputs: Array

    @property
    def block_rows(self) -> int:
        """How many block rows there are."""
        return len(self.outputs)

    @property
    def blocks(self) -> int:
        """How many blocks are multiplied."""
        return len(self.values) // self.height

    def constants(self, *chunks: int) -> list[Array]:
        """What a kernel takes of the section: the arrays above, and `bounds` for each number of chunks."""
        arrays = (self.values, self.offsets, self.ends.reshape(-1), self.outputs, *map(self.bounds, chunks))
        return [array if len(array) else np.zeros(1, array.dtype) for array in arrays]

    def bounds(self, chunks: int) -> Array:
        """Where to cut the block rows into `chunks` runs of about as many blocks: (chunks + 1,) int32."""
        done = np.diff(self.ends).sum(0, dtype=np.int64)
        work = np.concatenate([[0], np.cumsum(done + 2)])
        wanted = np.arange(1, chunks) * (work[-1] / chunks)
        return np.concatenate([[0], np.searchsorted(work, wanted), [self.block_rows]]).astype(np.int32)


def blocks_of(matrix: Array, height: int) -> int:
    """How many blocks of a height have an element that is not zero; in rows that are left over, of what is left."""
    whole = len(matrix) // height * height
    kept = (matrix[:whole].reshape(whole // height, height, -1) != 0).any(1).sum() if whole else 0
    return int(kept + (matrix[whole:] != 0).any(0).sum())


def pack(matrix: Array, offsets: Array, height: int, rest: int = 0, runs: int = 1) -> tuple[Section, ...]:
    """Pack a matrix (outputs, inputs) whose input i begins at offsets[i]; outputs left over in blocks of `rest`.

    Each of the `runs` has as many of the inputs that are used at all.
    """
    whole = len(matrix) // height * height
    used = np.cumsum((matrix != 0).any(0))
    run_of = (used - 1) * runs // max(1, used[-1])
    sections = []
    if whole:
        sections.append(_section(matrix[:whole], offsets, height, 0, run_of, runs))
    if whole < len(matrix):
        sections.append(_section(matrix[whole:], offsets, rest or len(matrix) - whole, whole, run_of, runs))
    return tuple(sections)


def _section(matrix: Array, offsets: Array, height: int, first: int, run_of: Array, runs: int) -> Section:
    blocks = matrix.reshape(-1, height, matrix.shape[1])
    kept = (blocks != 0).any(1)
    order = np.argsort(-kept.sum(1), kind="stable")
    rows, inputs = np.nonzero(kept[order])
    if runs > 1:
        by_run = np.argsort(run_of[inputs], kind="stable")
        rows, inputs = rows[by_run], inputs[by_run]
    counts = np.bincount(run_of[inputs] * len(blocks) + rows, minlength=runs * len(blocks)).reshape(runs, -1)
    begins = np.cumsum(counts.sum(1)) - counts.sum(1)
    ends = np.concatenate([begins[:, None], begins[:, None] + np.cumsum(counts, 1)], 1)
    return Section(
        height=height,
        values=np.ascontiguousarray(blocks[order[rows], :, inputs]).astype(np.float32).reshape(-1),
        offsets=np.pad(offsets[inputs].astype(np.int32), (0, AHEAD)),
        ends=ends.astype(np.int32),
        outputs=(first + order * height).astype(np.int32),
    )
