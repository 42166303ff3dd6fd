"""How large the weights of an item are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis
from graphopt.passes.criteria.base import Elementwise, Member, Tally, checked_choice, members, normalised

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class L1(Elementwise):
    """Sum of absolute weights over all tensors that have the item.

        score_j = reduce over tensors W of   sum |w|, w in W and of item j

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710. Differs: all tensors of
    the axis count, as in DepGraph (arXiv:2301.12900), not only the filter itself.

    Attributes:
        reduce: "sum", "mean" or "max" over the tensors.
        vectors: count biases and scales of norms, too; they have another scale than weights.
        normalise: "none", or a scale of the axis: "mean" (DepGraph's), "max", "sum", "gaussian", "lamp".
    """

    name: ClassVar[str] = "l1"
    power: ClassVar[int] = 1
    reduce: str = "sum"
    vectors: bool = False
    normalise: str = "none"

    def elements(self, axes: Axes, calibration: Calibration | None) -> Iterator[tuple[Member, Tensor]]:
        """See Elementwise."""
        for member in members(axes):
            if member.tensor.dim() > 1 or self.vectors:
                yield member, member.tensor.double().abs() ** self.power

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        checked_choice(self.name, "reduce", self.reduce, ("sum", "mean", "max"))
        tally = Tally(wanted)
        total, counts = tally.zeros(), dict.fromkeys(tally.wanted, 0)
        for member, values in self.elements(axes, calibration):
            for atom, sums in tally.sums(member.dims, values).items():
                total[atom] = torch.maximum(total[atom], sums) if self.reduce == "max" else total[atom] + sums
                counts[atom] += 1
        if self.reduce == "mean":
            total = {atom: score / max(counts[atom], 1) for atom, score in total.items()}
        return {atom: normalised(score, self.normalise) for atom, score in total.items()}


@dataclass(frozen=True)
class L2(L1):
    """Sum of squared weights over all tensors that have the item, without the root; otherwise as `l1`.

        score_j = reduce over tensors W of   sum w^2, w in W and of item j

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv:2301.12900. Differs: vectors and
    normalisation are options that are off.
    """

    name: ClassVar[str] = "l2"
    power: ClassVar[int] = 2
