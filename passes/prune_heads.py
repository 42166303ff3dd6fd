"""Remove attention heads until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.reduction import Reduction


@dataclass(frozen=True)
class PruneHeads(Reduction):
    """Shrink every free head axis; a head of keys and values goes with all query heads that read it.

        before  q (h=12 d=64, e), k (h=12 d=64, e), v (h=12 d=64, e), out (e, h=12 d=64)
        after   q (h=7 d=64, e),  k (h=7 d=64, e),  v (h=7 d=64, e),  out (e, h=7 d=64)
        grouped q (h=8 g=4 d), k (h=8 d), v (h=8 d)  ->  q (h=5 g=4 d), k (h=5 d), v (h=5 d)

    Every layer may keep another number, at least one: the residual stream carries what is left. To drop query heads and
    keep keys and values, use reduce-query-heads.

    Source: Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019, arXiv:1905.10650. Differs: any
    criterion and allocation.
    """

    name: ClassVar[str] = "prune-heads"
    roles: ClassVar[tuple[str, ...]] = ("head",)
