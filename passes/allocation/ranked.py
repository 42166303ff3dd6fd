"""One ranking of all groups of all axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.budget import Ints
from graphopt.passes.allocation.base import Allocation, Problem, least_prefix


@dataclass(frozen=True)
class Global(Allocation):
    """Remove what scores lowest, wherever it is, until the budget is met.

        c0 [9 8 7 1], c1 [6 5 4 3]     ->     c0 [9 8 7], c1 [6]

    The floor of every axis holds: a group that would go below it stays, and the next in the ranking leaves in its
    place. Without such a floor a global ranking empties whole layers, which is the lesson of the paper. Groups are
    ranked by the mean score of their items, so that the order is that of single items where the step is 1.

    Source: Gupta et al., "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
    arXiv:2209.14624. Differs: items instead of single weights; scores of criteria that are not comparable are divided
    by their axis's mean first, as in DepGraph (arXiv:2301.12900).
    """

    name: ClassVar[str] = "global"

    def levels(self, problem: Problem) -> Ints:
        """See Allocation."""
        return least_prefix(problem, ranking(problem))


def ranking(problem: Problem) -> list[int]:
    """The variable whose next group leaves, for all groups: by ascending mean score, then in order of the variables."""
    means, places = [np.zeros(0)], [np.zeros(0, np.int64)]
    for place, (sizes, losses) in enumerate(zip(problem.ladders, problem.losses, strict=True)):
        each = losses / -np.diff(sizes)
        means.append(
            np.maximum.accumulate(each) if len(each) else each
        )  # rounding must not change the order in an axis
        places.append(np.full(len(each), place, np.int64))
    order = np.argsort(np.concatenate(means), kind="stable")
    return [int(place) for place in np.concatenate(places)[order]]
