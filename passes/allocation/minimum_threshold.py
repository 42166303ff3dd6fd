"""Global Magnitude Pruning's own way with its floor: scale the shares of the layers that are above it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.budget import Floats, Ints
from graphopt.passes.allocation.base import Allocation, Problem, least_prefix
from graphopt.passes.allocation.ranked import ranking


@dataclass(frozen=True)
class MinimumThreshold(Allocation):
    """Prune globally, then raise the layers that fell below a floor and let the others pay for it in proportion.

        items 100 100 20, floor 10, 150 leave      global ranking removes 98 40 12
        raised and scaled                          90 50 10: no axis keeps fewer than 10

    The floor is `minimum` percent of all items together; axes that have no more than that stay whole. `global` keeps
    its floor, too, but there the next in the ranking leave instead, wherever they are.

    Source: Gupta et al., arXiv:2209.14624, "Global MP with MT". Differs: items instead of single weights, and where
    even all axes at this floor do not meet the budget, the ranking goes on below it, down to the floor that the pass
    sets.
    """

    name: ClassVar[str] = "minimum-threshold"
    minimum: float = 0.5

    def levels(self, problem: Problem) -> Ints:
        """See Allocation."""
        extents = problem.meter.extents
        floor = int(extents.sum() * self.minimum / 100)
        order = ranking(problem)

        def at(count: int) -> Ints:
            gone = np.bincount(np.asarray(order[:count], np.int64), minlength=len(extents))
            removed = extents - problem.sizes_at(gone)
            kept = extents * (1 - raised(extents, removed, floor))
            return np.array([int(np.argmin(np.abs(own - k))) for own, k in zip(problem.ladders, kept, strict=True)])

        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if problem.cost_at(at(middle)) <= problem.limit:
                high = middle
            else:
                low = middle + 1
        levels = at(low)
        if problem.cost_at(levels) <= problem.limit:
            return levels
        seen, rest = np.zeros(len(extents), np.int64), []
        for place in order:
            seen[place] += 1
            if seen[place] > levels[place]:
                rest.append(place)
        return least_prefix(problem, rest, levels)


def raised(extents: Ints, removed: Ints, floor: int) -> Floats:
    """The share of each layer that leaves, such that all together as many leave as the removed, where floors allow it.

    Args:
        extents: items of each layer.
        removed: how many of each a ranking without floors removes.
        floor: the least that stays of each layer; of shorter layers nothing leaves.
    """
    total = float(removed.sum())
    most = np.where(extents > floor, 1 - floor / np.maximum(extents, 1), 0.0)
    total = min(total, float((most * extents).sum()))
    shares = np.minimum(removed / extents, most)
    for _ in range(100):
        now = float((shares * extents).sum())
        if total - now <= 1e-9 * max(total, 1.0):
            break
        free = (shares < most) & (shares > 0)
        if not free.any():  # nothing to scale: everything that still may gives the same share
            free = shares < most
            shares = np.where(free, np.minimum(most, shares + (total - now) / float(extents[free].sum())), shares)
            continue
        own = float((shares * extents)[free].sum())
        shares = np.where(free, np.minimum(most, shares * (1 + (total - now) / own)), shares)
    return shares
