"""Fewer query heads than keys and values would allow: the work of attention itself falls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from graphopt.axes import Axes, Axis, infer
from graphopt.budget import meter
from graphopt.errors import Decline
from graphopt.passes.pool_kv_heads import PoolKvHeads
from graphopt.passes.query_groups import outer_of
from graphopt.passes.reduction import Reduction
from graphopt.program import Program


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
