"""OPTIN's allocation: heads in one ranking, everything else in another, and the best split of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.budget import Floats, Ints
from graphopt.passes.allocation.base import Allocation, Problem
from graphopt.passes.allocation.ranked import ranking


@dataclass(frozen=True)
class TwoLists(Allocation):
    """For every number of head groups that leave, let the fewest others leave that the budget asks for; take the best.

        heads    ranked  h1 < h2 < h3        neurons  ranked  n1 < n2 < ... < n9
        0 heads leave: n1..n7 must, loses 2.1;  1: n1..n4, loses 1.3;  2: n1, loses 1.9      ->  1 head, 4 neurons

    The best is what loses the least score. Where all heads cost the same and all neurons do, no other choice of
    prefixes is better. Without heads, or without others, it is the global ranking. `heads` are the roles of the first
    list.

    Source: Khaki and Plataniotis, "The Need for Speed: Pruning Transformers with One Recipe" (OPTIN), ICLR 2024,
    arXiv:2403.17921. Differs: costs are those of the whole program at the sizes in question, not a constant for each
    head and neuron; numbers of heads that exceed the budget on their own are skipped, and floors hold.
    """

    name: ClassVar[str] = "two-lists"
    heads: tuple[str, ...] = ("head", "query_group")

    def levels(self, problem: Problem) -> Ints:
        """See Allocation."""
        first = [problem.axes.role(axis) in self.heads for axis in problem.variables]
        order = ranking(problem)
        heads = [place for place in order if first[place]]
        others = [place for place in order if not first[place]]
        rows, columns = _after(problem, heads), _after(problem, others)
        lost = [_lost(problem, places) for places in (heads, others)]
        low = np.zeros(len(rows), np.int64)
        high = np.full(len(rows), len(others), np.int64)
        reachable = _cost(problem, rows, columns, high) <= problem.limit
        while (low < high).any():
            middle = (low + high) // 2
            met = _cost(problem, rows, columns, middle) <= problem.limit
            low, high = np.where(met, low, np.minimum(middle + 1, high)), np.where(met, middle, high)
        totals = np.where(reachable, lost[0] + lost[1][low], np.inf)
        best = int(np.argmin(totals))
        return rows[best] + columns[low[best]]


def _after(problem: Problem, order: Sequence[int]) -> Ints:
    """Places on the ladders after each prefix of an order: (len + 1, variables)."""
    steps = np.zeros((len(order) + 1, len(problem.variables)), np.int64)
    steps[np.arange(1, len(order) + 1), np.asarray(order, np.int64)] = 1
    return np.cumsum(steps, 0)


def _lost(problem: Problem, order: Sequence[int]) -> Floats:
    """The sum of normal scores that each prefix of an order loses: (len + 1,)."""
    level, lost = [0] * len(problem.variables), [0.0]
    for place in order:
        lost.append(lost[-1] + float(problem.losses[place][level[place]]))
        level[place] += 1
    return np.array(lost)


def _cost(problem: Problem, rows: Ints, columns: Ints, chosen: Ints) -> Floats:
    return problem.meter.many(problem.sizes_at(rows + columns[chosen]))
