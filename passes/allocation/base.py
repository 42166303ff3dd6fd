"""What an allocation is: from scores and a budget to how many items of each axis stay.

Every axis has a ladder: the sizes that it may have, from its extent down to its floor, multiples of its step all but
the first. A group is what leaves between two rungs; the groups of one axis leave in order, the least important items
first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from graphopt.axes import Axes, Axis
from graphopt.budget import SLACK, Budget, Floats, Ints, Meter
from graphopt.errors import BudgetUnreachable

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

Sizes = Mapping[Axis, int]
# With so many axes, exchanges of many groups are tried: with more, steps are fine enough.
_FEW = 24


def no_calibration() -> Calibration:
    """For allocations that measure nothing."""
    raise AssertionError("this allocation needs calibration data, and the pass gave none")


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be decided.

    `meter` gives the budgeted quantity when its variables, the axes that `scores` has, in order, have some sizes;
    `limit` is the most it may be. `step[axis]` is the multiple that the target wants of what stays, `floor[axis]` the
    least that may stay (both in items). `scores` are the criterion's, `comparable` whether they may be ranked across
    axes as they are; where not, an axis's scores are divided by their mean. `calibration` is asked only by those that
    measure.
    """

    axes: Axes
    scores: Mapping[Axis, Tensor]
    comparable: bool
    meter: Meter
    limit: float
    step: Mapping[Axis, int]
    floor: Mapping[Axis, int]
    calibration: Callable[[], Calibration] = field(default=no_calibration)

    @cached_property
    def variables(self) -> tuple[Axis, ...]:
        """The axes to be decided, in the order of arrays of sizes."""
        return self.meter.variables

    @cached_property
    def normal(self) -> list[Floats]:
        """The scores of each axis that are compared across axes, sorted ascending."""
        found = []
        for axis in self.variables:
            scores = self.scores[axis].double().sort().values.numpy()
            mean = np.abs(scores).mean()
            found.append(scores if self.comparable or mean == 0 else scores / mean)
        return found

    @cached_property
    def ladders(self) -> list[Ints]:
        """The sizes that each axis may have, largest first."""
        return [ladder(axis.extent, self.step[axis], self.floor[axis]) for axis in self.variables]

    @cached_property
    def losses(self) -> list[Floats]:
        """The sum of normal scores of each group: one shorter than the ladder."""
        found = []
        for sizes, scores in zip(self.ladders, self.normal, strict=True):
            below = np.concatenate([[0.0], np.cumsum(scores)])[len(scores) - sizes]
            found.append(np.diff(below))
        return found

    def sizes_at(self, levels: Ints) -> Ints:
        """Sizes by place on the ladders, 0 for the whole axis: (..., variables) both."""
        levels = np.asarray(levels)
        columns = [steps[levels[..., place]] for place, steps in enumerate(self.ladders)]
        return np.stack(columns, -1) if columns else np.zeros(levels.shape, np.int64)

    def cost_at(self, levels: Ints) -> float:
        """The budgeted quantity at places on the ladders."""
        return self.meter.one(self.sizes_at(levels))

    @cached_property
    def depth(self) -> Ints:
        """The last place of each ladder."""
        return np.array([len(steps) - 1 for steps in self.ladders], np.int64)

    def as_sizes(self, levels: Ints) -> dict[Axis, int]:
        """Sizes by axis at places on the ladders."""
        return dict(zip(self.variables, map(int, self.sizes_at(levels)), strict=True))


@dataclass(frozen=True)
class Allocation(ABC):
    """Decides sizes. Options are fields."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False

    @abstractmethod
    def levels(self, problem: Problem) -> Ints:
        """The place on its ladder for each variable, such that the budget is met. That it can be is known."""

    def worth(self, problem: Problem, levels: Ints) -> Floats:
        """Where some of the budget is left: the variable with the highest gets its last group back, if that fits.

        By default the mean score of that group; any number where there is none.
        """
        pairs = zip(problem.losses, levels, strict=True)
        losses = [own[max(level - 1, 0)] if len(own) else 0.0 for own, level in pairs]
        width = problem.sizes_at(np.maximum(levels - 1, 0)) - problem.sizes_at(levels)
        return np.array(losses) / np.maximum(width, 1)

    def sizes(self, problem: Problem, budget: Budget) -> dict[Axis, int]:
        """How many items of each scored axis stay; the budgeted quantity of it meets the limit.

        Raises:
            BudgetUnreachable: even with every axis at its floor it is not met; gives what would be.
        """
        levels = np.zeros(len(problem.variables), np.int64)
        if problem.meter.full <= problem.limit:
            return problem.as_sizes(levels)
        least = problem.cost_at(problem.depth)
        if least > problem.limit:
            shown = budget.show(least, problem.meter.full)
            asked = budget.show(problem.limit, problem.meter.full)
            raise BudgetUnreachable(file=problem.axes.program.name, kind=budget.kind, asked=asked, least=shown)
        levels = np.asarray(self.levels(problem), np.int64)
        levels = close(problem, levels, self.worth)
        assert problem.cost_at(levels) <= problem.limit, f"{self.name} does not meet the budget"
        return problem.as_sizes(levels)


def ladder(extent: int, step: int, floor: int) -> Ints:
    """The extent, then every smaller multiple of `step` that is at least `floor` (and 1), descending."""
    least = max(floor, 1)
    multiples = range((extent - 1) // step * step, least - 1, -step)
    return np.array([extent, *[size for size in multiples if size >= 1]], np.int64)


def top(scores: Tensor, size: int) -> Tensor:
    """The indices of the `size` highest scores, ascending; of equal ones the first stay."""
    order = torch.sort(scores.double(), descending=True, stable=True).indices
    return order[:size].sort().values


def least_prefix(problem: Problem, order: Sequence[int], start: Ints | None = None) -> Ints:
    """Walk down the ladders, each entry of `order` one step on that variable's, until the budget is met.

    The quantity must not grow on the way, and must meet the limit at its end. `start` is where the walk starts, by
    default with whole axes.
    """
    low, high = 0, len(order)
    places = np.asarray(order, np.int64)
    first = np.zeros(len(problem.variables), np.int64) if start is None else start

    def after(count: int) -> Ints:
        return first + np.bincount(places[:count], minlength=len(problem.variables))

    while low < high:
        middle = (low + high) // 2
        if problem.cost_at(after(middle)) <= problem.limit:
            high = middle
        else:
            low = middle + 1
    return after(low)


Worth = Callable[[Problem, Ints], Floats]


def close(problem: Problem, levels: Ints, worth: Worth) -> Ints:
    """Use up what is left of the budget: give back groups, those worth most first, while they fit; then, where more
    than SLACK is still left, exchange groups for others, whichever come nearest.
    """
    levels = give_back(problem, levels, worth)
    for _ in range(2 * len(levels)):
        cost = problem.cost_at(levels)
        if cost >= (1 - SLACK) * problem.limit:
            break
        found = _best(problem, levels, _exchanges(problem, levels, 3), cost)
        if (found is None or problem.cost_at(found) < (1 - SLACK) * problem.limit) and len(levels) <= _FEW:
            found = _best(problem, levels, _exchanges(problem, levels, 8), cost)
        if found is None or problem.cost_at(found) < (1 - SLACK) * problem.limit:
            others = _best(problem, levels, _detours(problem, levels, worth), cost)
            found = _best(problem, levels, [row for row in (found, others) if row is not None], cost)
        if found is None:
            break
        levels = give_back(problem, found, worth)
    return levels


def give_back(problem: Problem, levels: Ints, worth: Worth) -> Ints:
    """Take groups back, that of the variable worth most first, while the budget stays met."""
    levels = levels.copy()
    while (levels > 0).any():
        now = problem.sizes_at(levels)
        before = problem.sizes_at(np.maximum(levels - 1, 0))
        fits = (problem.meter.each(now, before) <= problem.limit) & (levels > 0)
        if not fits.any():
            break
        levels[int(np.argmax(np.where(fits, worth(problem, levels), -np.inf)))] -= 1
    return levels


def _exchanges(problem: Problem, levels: Ints, most: int) -> list[Ints]:
    """Up to `most` groups back here and up to as many more away there."""
    count = len(levels)
    tried = []
    for back in range(1, most + 1):
        for more in range(1, most + 1):
            steps = np.repeat(levels[None], count * count, 0).reshape(count, count, count)
            own = np.arange(count)
            steps[own, :, own] -= back
            steps[:, own, own] += more
            flat = steps.reshape(-1, count)
            valid = ((flat >= 0) & (flat <= problem.depth)).all(1) & ~np.eye(count, dtype=bool).reshape(-1)
            tried += list(flat[valid])
    return tried


def _detours(problem: Problem, levels: Ints, worth: Worth) -> list[Ints]:
    """One group back, and instead as many of all others as it takes, those first that lose least for what they save."""
    found = []
    for place in np.nonzero(levels)[0]:
        start = levels.copy()
        start[place] -= 1
        now = problem.sizes_at(start)
        costs = problem.meter.each(now, problem.sizes_at(np.minimum(start + 1, problem.depth)))
        saved = problem.cost_at(start) - costs
        rates = [
            problem.losses[p][start[p]] / saved[p]
            if p != place and start[p] < problem.depth[p] and saved[p] > 0
            else np.inf
            for p in range(len(start))
        ]
        order = [int(p) for p in np.argsort(rates, kind="stable") if np.isfinite(rates[p])]
        order = [p for p in order for _ in range(problem.depth[p] - start[p])]
        end = start + np.bincount(np.asarray(order, np.int64), minlength=len(start))
        if problem.cost_at(end) <= problem.limit:
            found.append(give_back(problem, least_prefix(problem, order, start), worth))
    return found


def _best(problem: Problem, levels: Ints, rows: Sequence[Ints], cost: float) -> Ints | None:
    """Of some places on the ladders the one that uses more of the budget than `cost`: of those that use it up, within
    SLACK, what harms least, else what uses most. None where none does.
    """
    if not rows:
        return None
    table = np.stack(rows)
    costs = problem.meter.many(problem.sizes_at(table))
    better = (costs <= problem.limit) & (costs > cost)
    if not better.any():
        return None
    near = better & (costs >= (1 - SLACK) * problem.limit)
    if not near.any():
        return table[int(np.argmax(np.where(better, costs, -np.inf)))]
    harm = [_harm(problem, levels, row) if ok else np.inf for row, ok in zip(table, near, strict=True)]
    return table[int(np.argmin(harm))]


def _harm(problem: Problem, old: Ints, new: Ints) -> float:
    harm = 0.0
    for place in np.nonzero(old != new)[0]:
        a, b = old[place], new[place]
        harm += float(problem.losses[place][a:b].sum() - problem.losses[place][b:a].sum())
    return harm
