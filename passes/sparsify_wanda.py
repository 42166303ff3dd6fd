"""Set the weights to zero that move the outputs least: small ones, and those that meet small inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.passes.layer_by_layer import LayerByLayer
from graphopt.passes.sparsify import Plan


@dataclass(frozen=True)
class SparsifyWanda(LayerByLayer):
    """Zero the weights with the least |weight| x norm of the input that it meets, as many in each row of a layer.

        before  linear (o=1 i=4) [[1, 2, 3, 4]]         inputs of norms 9, 1, 1, 1        keep=0.5
        after   linear (o=1 i=4) [[1, 0, 0, 4]]         9 and 4 are the largest of 9, 2, 3, 4

    Layer after layer, on the inputs that are left when those in front are sparse. With a format the scores of a block
    add up; N:M takes the best N of each M. All layers keep the same share by default. Options are those of `Sparsify`.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    arXiv:2306.11695. Differs: convolutions, each place of the kernel with its own norm; formats with blocks.
    """

    name: ClassVar[str] = "sparsify-wanda"
    by_row: ClassVar[bool] = True
    whole_moments: ClassVar[bool] = False

    def pruned(self, plan: Plan, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor | None]:
        """See LayerByLayer."""
        sums = plan.grid.sums(by_norms(weight, moments))
        return plan.grid.elements(plan.grid.pick(sums, plan.target, by_row=True)), None


def by_norms(weight: Tensor, squares: Tensor) -> Tensor:
    """|weight| times the root mean squares of inputs: (outs, ins), (groups, ins) to (outs, ins)."""
    groups = len(squares)
    grouped = weight.reshape(groups, -1, weight.shape[1]).abs() * squares.sqrt()[:, None]
    return grouped.reshape(weight.shape)
