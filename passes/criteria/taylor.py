"""What the loss changes by to first order when an item goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis
from graphopt.observe import Gradients, gradients
from graphopt.passes.criteria.base import Elementwise, Member, Tally, data_of, members

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Taylor(Elementwise):
    """First-order Taylor expansion of the loss, over all parameters that have the item.

        score_j = mean over batches  sum |g_w w|          w of item j, g_w: the gradient of the batch's mean loss
        signed    score_j = mean over batches |sum g_w w|

    All parameters count, biases and scales of norms included. Without labels the program is its own teacher, see
    `graphopt.observe.gradients`.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017,
    arXiv:1611.06440, and, for weights, "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv:1906.10771.
    Differs: absolute values are taken batch by batch, not of gradients that were summed over data, in which a trained
    network's cancel; all tensors of the axis count.

    Attributes:
        signed: add up g w over all of an item before taking the absolute value.
        loss: "auto", "labels", "distill" or "fisher".
    """

    name: ClassVar[str] = "taylor"
    needs_calibration: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    signed: bool = False
    loss: str = "auto"

    def elements(self, axes: Axes, calibration: Calibration | None) -> Iterator[tuple[Member, Tensor]]:
        """See Elementwise: the mean over batches of |g w|."""
        data = data_of(axes, calibration)
        found = members(axes)
        totals = [torch.zeros_like(member.tensor, dtype=torch.float64) for member in found]
        for batch in gradients(axes.program, data, self.loss, wanted=names_of(found)):
            for member, total in zip(found, totals, strict=True):
                total += products(member, batch).abs()
        for member, total in zip(found, totals, strict=True):
            yield member, total / len(data)

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        if not self.signed:
            return super().scores(axes, wanted, calibration)
        data, tally = data_of(axes, calibration), Tally(wanted)
        total = tally.zeros()
        for sums in signed_sums(axes, tally, gradients(axes.program, data, self.loss, wanted=names_of(members(axes)))):
            for atom, values in sums.items():
                total[atom] += values.abs()
        return {atom: score / len(data) for atom, score in total.items()}


def names_of(found: Sequence[Member]) -> list[str]:
    """All names of some members."""
    return [name for member in found for name in member.names]


def products(member: Member, batch: Gradients) -> Tensor:
    """g w for every element of a member, float64; tied tensors have the sum of their gradients."""
    gradient = sum((batch.of[name].double() for name in member.names), torch.zeros((), dtype=torch.float64))
    return member.tensor.double() * gradient


def signed_sums(axes: Axes, tally: Tally, batches: Iterable[Gradients]) -> Iterator[dict[Axis, Tensor]]:
    """For each batch the sum of g w over all that belongs to each item."""
    found = members(axes)
    for batch in batches:
        total = tally.zeros()
        for member in found:
            for atom, sums in tally.sums(member.dims, products(member, batch)).items():
                total[atom] += sums
        yield total
