"""Weights times what they meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, find
from graphopt.errors import Decline
from graphopt.passes.criteria.base import Elementwise, Member, Tally, checked_choice, data_of, members, stand_in
from graphopt.passes.criteria.uses import Use, input_norms, uses

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class Wanda(Elementwise):
    """Sum of |weight| times the norm of the input that it is multiplied with.

        element  S_ij = |W_ij| * ||x_j||_2           x_j: input j over batch and positions
        item     score_j = sum over consumers  sum_i S_ij  =  sum over consumers  ||x_j|| * ||W_:j||_1

    An axis that nothing stored consumes (the head size of queries and keys) sums the rows that produce it. Embeddings
    are products with one-hot rows, so their norm is the root of how often a word occurs. Axes of which no product with
    a stored weight is known get the norm of their weights; `fallbacks` names them.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    arXiv:2306.11695. Differs: convolutions, whose channels have one norm over all positions, not one for each place of
    the kernel; items instead of weights within a row; the inner layers of recurrent networks take the norms of the
    last.

    Attributes:
        ends: "consumers": where an item goes in, else where it comes from; "all": both.
    """

    name: ClassVar[str] = "wanda"
    needs_calibration: ClassVar[bool] = True
    ends: str = "consumers"

    def elements(self, axes: Axes, calibration: Calibration | None) -> Iterator[tuple[Member, Tensor]]:
        """See Elementwise. Tensors that several calls use have the sum of these."""
        total: dict[Member, Tensor] = {}
        for member, _, values in self._parts(axes, calibration):
            total[member] = total[member] + values if member in total else values
        yield from total.items()

    def scores(self, axes: Axes, wanted: Sequence[Axis], calibration: Calibration | None) -> dict[Axis, Tensor]:
        """See Criterion."""
        checked_choice(self.name, "ends", self.ends, ("consumers", "all"))
        tally = Tally(wanted)
        consumed, produced = tally.zeros(), tally.zeros()
        has_consumer: set[Axis] = set()
        for member, use, values in self._parts(axes, calibration):
            inward = tally.sums(member.dims, values, lambda _, place, use=use: place in use.summed)  # type: ignore[misc]
            has_consumer.update(inward)
            for atom, sums in tally.sums(member.dims, values).items():
                outward = sums - inward[atom] if atom in inward else sums
                produced[atom] += outward.clamp_min(0)
            for atom, sums in inward.items():
                consumed[atom] += sums
        found = {}
        unused = self._without_use(axes, wanted)
        for atom in tally.wanted:
            if atom in unused:
                continue
            both = consumed[atom] + produced[atom]
            found[atom] = consumed[atom] if self.ends == "consumers" and atom in has_consumer else both
        return {**found, **stand_in(axes, unused, found)}

    def fallbacks(self, axes: Axes, wanted: Sequence[Axis]) -> list[Decline]:
        """See Criterion."""
        reason = f"{self.name}: no product of its weights with a known input; scored by the norm of its weights"
        return [Decline(axes.where(atom), reason) for atom in self._without_use(axes, wanted)]

    @staticmethod
    def _without_use(axes: Axes, wanted: Sequence[Axis]) -> list[Axis]:
        tally = Tally(wanted)
        known = {atom for use in uses(axes) for atom in tally.atoms_of(axes.dims[use.weight])}
        return [atom for atom in map(find, wanted) if atom not in known]

    @staticmethod
    def _parts(axes: Axes, calibration: Calibration | None) -> Iterator[tuple[Member, Use, Tensor]]:
        """Each use of a weight with the values of its elements there."""
        by_name = {name: member for member in members(axes) for name in member.names}
        found = [use for use in uses(axes) if use.weight.name in by_name]
        for use, norms in input_norms(axes, found, data_of(axes, calibration)):
            member = by_name[use.weight.name]
            yield member, use, (member.tensor.double().abs() * norms).broadcast_to(torch.Size(member.tensor.shape))
