"""How large the weights of an item are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis
from graphopt.passes.criteria.base import Criterion, stored_values, sum_onto

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class L1(Criterion):
    """Sum of absolute weights over all tensors that have the item.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710. Differs: all tensors of
    the axis count, as in DepGraph (arXiv:2301.12900), not only the filter itself.
    """

    name: ClassVar[str] = "l1"
    power: ClassVar[int] = 1

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        return {atom: self._score(axes, atom) for atom in wanted}

    def _score(self, axes: Axes, atom: Axis) -> Tensor:
        nodes = {node.name: dims for node, dims in axes.dims.items() if node.op == "placeholder"}
        total = torch.zeros(atom.extent, dtype=torch.float64)
        for name, tensor, place, _ in stored_values(axes, atom):
            if tensor.dim() > 1:  # norms and biases have another scale
                total += sum_onto(tensor.double().abs() ** self.power, nodes[name], place, atom)
        return total


@dataclass(frozen=True)
class L2(L1):
    """Sum of squared weights, as L1."""

    name: ClassVar[str] = "l2"
    power: ClassVar[int] = 2
