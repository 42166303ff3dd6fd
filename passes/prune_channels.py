"""Remove whole channels of convolutions until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.reduction import Reduction


@dataclass(frozen=True)
class PruneChannels(Reduction):
    """Shrink every free channel axis, least important channels first.

        before  conv1 (o=64 i=3 3 3) -> relu -> conv2 (o=128 i=64 3 3)
        after   conv1 (o=40 i=3 3 3) -> relu -> conv2 (o=128 i=40 3 3)

    Layers that must agree (residual adds, depthwise, concatenation) share an axis, so they shrink together. Groups of
    a convolution lose the same positions each.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710. Differs: any criterion and
    allocation, and axes that are coupled are scored and cut as one (Fang et al., "DepGraph", arXiv:2301.12900).
    """

    name: ClassVar[str] = "prune-channels"
    roles: ClassVar[tuple[str, ...]] = ("channel",)
