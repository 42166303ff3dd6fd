"""Prune tokens, then merge some more, block by block, as many as were found to cost least."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from graphopt.calibration import calibration
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.passes.sizes import limit
from graphopt.passes.tokens.base import TokenReduction
from graphopt.passes.tokens.budgets import COUNTED
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.reducers import PruneMerge, Reducer
from graphopt.passes.tokens.schedule import SCHEDULES


@dataclass(frozen=True)
class Diffrate(TokenReduction):
    """Drop the tokens that the class token looks at least, and merge the next ones into what they are most like.

        before  x (b, 197, c) -> attention -> mlp -> ...
        after   x (b, 197, c) -> attention -> sort, drop, merge (b, 157, c) -> mlp -> ...

    schedule: also "searched": rates of both at each place by gradient on calibration data, weights frozen.
    through: how many tokens are left at each place when some are dropped and none merged, beside `counts`.
    calibration: data to search on, with labels or without; the example inputs where there is none.
    steps: how long the search goes on, in steps of gradient descent.
    seed: the order of calibration data.

    What a search found is said as `counts` and `through`, so that it can be given again.

    Source: Chen et al., DiffRate, ICCV 2023, arXiv:2305.17997.
    """

    name: ClassVar[str] = "diffrate"
    schedules: ClassVar[tuple[str, ...]] = (*SCHEDULES, "searched")

    reducer: str = "prune-merge"
    through: tuple[int, ...] | None = None
    calibration: Any = None
    steps: int = 100
    seed: int = 0

    def check(self) -> None:
        super().check()
        if self.through is not None and (self.counts is None or len(self.through) != len(self.counts)):
            raise BadOption(what=f"{self.name}: through={self.through}", way_out="give as many counts beside it")
        if self.schedule == "searched" and not isinstance(self.made_reducer, PruneMerge):
            raise BadOption(what=f"{self.name}: rates of {self.reducer} cannot be searched", way_out="use prune-merge")
        if self.schedule == "searched" and self.budget is not None and self.budget.kind not in COUNTED:
            raise BadOption(
                what=f"{self.name}: rates are not searched for a budget of {self.budget.kind}",
                way_out="give --flops or --macs, or another schedule",
            )
        if self.steps < 1:
            raise BadOption(what=f"{self.name}: steps={self.steps}", way_out="give a number from 1")

    @property
    def made_reducer(self) -> Reducer:
        found = super().made_reducer
        if self.through is not None and isinstance(found, PruneMerge):
            return replace(found, through=self.through)
        return found

    def wanted(self, edit: Edit, job: Job) -> list[int]:
        if self.schedule != "searched" or self.counts is not None:
            return super().wanted(edit, job)
        from graphopt.passes.tokens.rates import search

        kind = self.budget.kind if self.budget is not None else "flops"
        model = job.segments(kind)
        linear = self.falling(edit, job, SCHEDULES["linear"])
        allowed = model(linear) if self.budget is None else limit(edit.program, self.budget)
        data = calibration(self.calibration, edit.program)
        rates = search(job, model, allowed, data, steps=self.steps, seed=self.seed)
        assert isinstance(job.reducer, PruneMerge)
        job.reducer = replace(job.reducer, share=rates.share)
        counts = self.falling(edit, job, rates.schedule)
        through, before = [], job.span.size
        for place, count in enumerate(counts):
            through.append(job.reducer.at(place).left(before, count))
            before = count
        edit.note(f"searched on {data.origin}: counts=({_listed(counts)}), through=({_listed(through)})")
        return counts


def _listed(counts: list[int]) -> str:
    return ",".join(map(str, counts))
