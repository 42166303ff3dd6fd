"""Make attention heads narrower until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.reduction import Reduction


@dataclass(frozen=True)
class PruneHeadDims(Reduction):
    """Shrink the size of heads: that of queries and keys, and that of values, each by itself, alike in all heads.

        before  q (h=12 d0=64, e), k (h=12 d0=64, e), v (h=12 d1=64, e), out (e, h=12 d1=64)
        after   q (h=12 d0=40, e), k (h=12 d0=40, e), v (h=12 d1=48, e), out (e, h=12 d1=48)

    The scale of attention stays that of the whole head. Where q, k and v come from one tensor that is taken apart item
    by item, or rotary embeddings pair dimensions, sizes that must agree are one axis.

    Source: the QK and V classes of Yang et al., NViT, CVPR 2023, arXiv:2110.04869. Differs: any criterion and
    allocation.
    """

    name: ClassVar[str] = "prune-head-dims"
    roles: ClassVar[tuple[str, ...]] = ("head_dim",)
