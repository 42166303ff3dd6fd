"""Fewer query heads than keys and values would allow: the work of attention itself falls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, atoms, infer, owner, results_of
from graphopt.axes.axis import parts
from graphopt.axes.choice import why_not_choose
from graphopt.budget import meter
from graphopt.errors import Decline
from graphopt.passes.allocation.base import top
from graphopt.passes.criteria.base import Elementwise
from graphopt.passes.pool_kv_heads import PoolKvHeads
from graphopt.passes.reduction import Reduction
from graphopt.program import Program

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


@dataclass(frozen=True)
class ReduceQueryHeads(Reduction):
    """Drop the same number of query heads of every head of keys and values, each head of keys its own least important.

        before  q (h=4 g=4 d), k (h=4 d), v (h=4 d), out (e, h=4 g=4 d)     attention over 16 heads
        after   q (h=4 g=2 d), k (h=4 d), v (h=4 d), out (e, h=4 g=2 d)     attention over 8 heads

    With `kv_heads`, attention whose queries and keys are in pairs is converted first: heads of keys and values are
    pooled (see pool-kv-heads, `conversion`), then query heads are dropped; SQA is half of the query heads, xSQA a
    quarter. The budget is that of the program before either.

    A score of each single query head is needed: the sum of the criterion's values over the weights that are its own
    (criteria that have no value for a weight are asked for the heads in the same place of all groups).

    Source: Filipek, "Sparse Query Attention (SQA)", 2025, arXiv:2510.01817. Differs: the paper trains such models; here
    a trained one is cut, so fine-tuning may be wanted.
    """

    name: ClassVar[str] = "reduce-query-heads"
    roles: ClassVar[tuple[str, ...]] = ("query_group",)

    kv_heads: int | None = None
    conversion: Literal["mean-pool", "group"] = "mean-pool"

    def __call__(self, program: Program) -> Program:
        """See Pass. A conversion is a pass of its own, with a record of its own."""
        if self.kv_heads is None:
            return super().__call__(program)
        self.check()
        rest = replace(self, kv_heads=None)
        if self.budget is not None and not self.budget.absolute:
            full = meter(self.budget.kind, infer(program), (), self.on_target).full
            rest = replace(rest, budget=replace(self.budget, amount=self.budget.amount * full, absolute=True))
        return rest(PoolKvHeads(self.kv_heads, self.conversion)(program))

    def wanted(self, axes: Axes, declined: list[Decline]) -> tuple[Axis, ...]:
        """See Reduction. Also declines heads whose queries and keys are in pairs."""
        for axis in axes.free("head"):
            if axis not in [outer_of(axes, inner) for inner in axes.free("query_group")]:
                reason = "each query head has keys of its own: give kv_heads to convert"
                declined.append(Decline(f"{axis.label} ({axes.where(axis)})", reason))
        return super().wanted(axes, declined)

    def score(self, axes: Axes, wanted: Sequence[Axis], declined: list[Decline]) -> dict[Axis, Tensor]:
        """See Reduction: a row for every head of keys, where these may choose for themselves."""
        outers = {inner: outer_of(axes, inner) for inner in wanted}
        own = [inner for inner, outer in outers.items() if outer and why_not_choose(axes, outer, inner) is None]
        criterion = self.made_criterion()
        if not isinstance(criterion, Elementwise):
            return super().score(axes, wanted, declined)
        data = self.read_calibration(axes) if criterion.needs_calibration else None
        pairs = [(outer, inner) for inner, outer in outers.items() if outer is not None]
        found = pair_scores(axes, criterion, pairs, data)
        return {inner: rows if inner in own else rows.sum(0) for inner, rows in found.items()}

    def chosen(self, axes: Axes, axis: Axis, scores: Tensor, size: int) -> tuple[Any, Tensor]:
        """See Reduction."""
        if scores.dim() == 1:
            return super().chosen(axes, axis, scores, size)
        return (outer_of(axes, axis), axis), torch.stack([top(row, size) for row in scores])


def outer_of(axes: Axes, inner: Axis) -> Axis | None:
    """The heads of keys that a query group belongs to: the factor in front of it, wherever it is one of a product."""
    for dims in axes.dims.values():
        for own in results_of(dims):
            for axis in own:
                factors = parts(axis, "product")
                for before, after in itertools.pairwise(factors):
                    if after is inner and before.kind is None:
                        return before
    return None


def pair_scores(
    axes: Axes, criterion: Elementwise, pairs: Sequence[tuple[Axis, Axis]], data: Calibration | None
) -> dict[Axis, Tensor]:
    """The sum of an elementwise criterion over what belongs to each pair of items: (outer, inner), by inner axis."""
    found = {inner: torch.zeros(outer.extent * inner.extent, dtype=torch.float64) for outer, inner in pairs}
    for member, values in criterion.elements(axes, data):
        for outer, inner in pairs:
            for place, axis in enumerate(member.dims):
                if inner not in atoms(axis) or outer not in atoms(axis):
                    continue
                first, second = owner(axis, outer), owner(axis, inner)
                own = (first >= 0) & (second >= 0)
                others = [n for n in range(values.dim()) if n != place]
                line = values.double().sum(others) if others else values.double()
                found[inner].index_add_(0, (first * inner.extent + second)[own], line[own])
    return {inner: found[inner].reshape(outer.extent, inner.extent) for outer, inner in pairs}
