"""Keep whole blocks of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.sparsify import Sparsify


@dataclass(frozen=True)
class SparsifyBlocks(Sparsify):
    """Zero the blocks of outputs x inputs that hold the least, after outputs that want the same inputs were grouped.

        before  linear (o=4 i=2) [[9, 0], [0, 8], [7, 1], [1, 6]]
        after   linear (o=4 i=2) [[9, 0], [7, 0], [0, 8], [0, 6]]       2x1, keep=0.5; outputs in the order 0 2 1 3

    Outputs are permuted first (with blocks of several inputs these, too) wherever an axis is free, so that the blocks
    hold as much as can be found; what reads them is permuted alike. Options are those of `Sparsify`.

    Source: Elsen et al., "Fast Sparse ConvNets", CVPR 2020, arXiv:1911.09723 (blocks of outputs); Lin et al., "1xN
    Pattern for Pruning Convolutional Neural Networks", TPAMI 2022, arXiv:2105.14713 (rearranged outputs). Differs: one
    shot; the order is searched for the kept magnitude, for all layers of an axis together.
    """

    name: ClassVar[str] = "sparsify-blocks"

    format: str = "4x1"
    rearrange: bool = True
