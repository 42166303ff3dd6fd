"""NViT: all dimensions of a vision transformer under one budget, with one second-order score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.axes import Axes, Axis
from graphopt.passes.reduction import Reduction

# Items that leave at a time, by role: what the paper's hardware likes.
GROUPS = {"embedding": 16, "head": 2, "head_dim": 8, "neuron": 16}


@dataclass(frozen=True)
class Nvit(Reduction):
    """Cut residual width, heads, head sizes of queries and keys and of values, and hidden neurons, ranked together.

        before  e=768, every block: 12 heads, QK 64, V 64, neurons 3072
        after   e=496, block by block: 6 to 12 heads, QK 32 to 64, V 40 to 64, neurons 1000 to 3000

    Score: (sum of gradient times weight)^2 of all that goes with an item, with the paper's divisors by class (criterion
    hessian). Allocation: groups of 16 features, 2 heads, 8 of a head's size or 16 neurons leave by score less eta times
    what the budgeted quantity gains; no class goes below one such group. An axis of fewer than four groups has smaller
    ones.

    Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023, arXiv:2110.04869;
    the code's groups. Differs: one shot instead of 100 steps of training between removals; the budget may be any
    quantity, not only latency; recovery by distillation is a step of its own.
    """

    name: ClassVar[str] = "nvit"
    roles: ClassVar[tuple[str, ...]] = ("embedding", "head", "head_dim", "neuron")

    criterion: str = "hessian:normalise=nvit"
    allocation: str = "latency-aware"

    def step_of(self, axes: Axes, axis: Axis) -> int:
        """See Reduction: by class where nothing else is asked for."""
        return GROUPS[axes.role(axis)] if self.step == "auto" else int(self.step)

    def floor_of(self, axes: Axes, axis: Axis) -> int:
        """See Reduction: a group of each class always stays, where the axis has several."""
        group = GROUPS[axes.role(axis)]
        return max(super().floor_of(axes, axis), group if axis.extent >= 2 * group else 1)
