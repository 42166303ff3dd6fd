"""Set the smallest weights to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.sparsify import Sparsify


@dataclass(frozen=True)
class SparsifyMagnitude(Sparsify):
    """Zero the weights with the lowest scores, by default the smallest of the whole network.

        before  a (o=2 i=2) [[9, -5], [1, 4]]   b (o=1 i=2) [[3, 2]]       keep=0.5
        after   a           [[9, -5], [0, 4]]   b           [[0, 0]]       b keeps its minimum, where there is one

    With another criterion the lowest of its scores; with a format whole blocks of the lowest sums. Options are those of
    `Sparsify`.

    Source: Gupta et al., "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
    arXiv:2209.14624 (Global MP with MT). Differs: exactly as many weights go as asked, whatever is equal.
    """

    name: ClassVar[str] = "sparsify-magnitude"
