"""Remove hidden neurons of feed-forward layers until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.passes.reduction import Reduction


@dataclass(frozen=True)
class PruneNeurons(Reduction):
    """Shrink every free neuron axis: what lies between two linear layers, gates included.

        before  up (n=3072 e=768), gate (n=3072 e=768) -> silu, mul -> down (e=768 n=3072)
        after   up (n=1536 e=768), gate (n=1536 e=768) -> silu, mul -> down (e=768 n=1536)

    The residual stream keeps its width, so layers are cut independently of each other.

    Source: a class of structures in NViT (Yang et al., CVPR 2023, arXiv:2110.04869) and OPTIN (Khaki and Plataniotis,
    ICLR 2024, arXiv:2403.17921). Differs: any criterion and allocation.
    """

    name: ClassVar[str] = "prune-neurons"
    roles: ClassVar[tuple[str, ...]] = ("neuron",)
