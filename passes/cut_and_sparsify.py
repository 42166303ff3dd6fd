"""One budget for a cut and for zeros: first axes shrink to a part of it, then weights are set to zero for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from graphopt.budget import Budget
from graphopt.errors import BadOption, BudgetNotShared, BudgetUnreachable
from graphopt.passes.base import Combined
from graphopt.passes.reduction import Reduction
from graphopt.passes.sizes import amount
from graphopt.passes.sparsify import Sparsify
from graphopt.program import Program


@dataclass(frozen=True)
class CutAndSparsify(Combined):
    """A reduction, then a sparsification of what it leaves. Lossy.

        before  conv (o=64 i=64 3 3)                       --flops 0.25
        after   conv (o=45 i=45 3 3), half of it zero      the cut leaves a half, and zeros a half of that

    cut, zeros: the passes; their own budgets do not count.
    budget: what the whole program may cost in the end, without what is zero.
    share: what the cut leaves of what the program costs. By default both take the same factor: the square root of what
        the budget is of the whole.
    """

    name: ClassVar[str] = "cut-and-sparsify"
    cut: Reduction
    zeros: Sparsify
    budget: Budget
    share: float | None = None

    def __call__(self, program: Program) -> Program:
        """The program after both passes, with a record of each.

        Raises:
            BadOption: a budget of bytes or latency.
            BudgetNotShared: the cut cannot leave so little.
            BudgetUnreachable: the whole budget cannot be met.
        """
        kind = self.budget.kind
        replace(self.zeros, budget=Budget(kind, 1.0), target="cpu").checked()  # before the time that a cut takes
        if kind == "latency":
            # An estimate of the whole and then of what the cut left would be off by other factors.
            raise BadOption(
                what=f"{self.cut.name} and {self.zeros.name} cannot share a budget of latency",
                way_out=f"give each its own: --pass {self.cut.name}:latency=0.7 --pass {self.zeros.name}:latency=0.5",
            )
        whole = amount(program, kind)
        allowed = self.budget.limit(whole)
        share = min(1.0, math.sqrt(allowed / whole)) if self.share is None else self.share
        try:
            small = replace(self.cut, budget=Budget(kind, share))(program)
        except BudgetUnreachable as error:
            raise BudgetNotShared(
                kind=kind,
                name=self.cut.name,
                share=f"{share:.3g}",
                least=error.fields.get("least", "more"),
                zeros=self.zeros.name,
                asked=self.budget.show(allowed, whole),
            ) from error
        return replace(self.zeros, budget=Budget(kind, allowed, absolute=True))(small)
