"""Every axis loses the same share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.budget import Floats, Ints
from graphopt.passes.allocation.base import Allocation, Problem


@dataclass(frozen=True)
class Uniform(Allocation):
    """Keep the same share of every axis: the largest with which the budget is met.

        budget 0.5     c0=64 -> 48, c1=128 -> 96, c2=256 -> 192

    Sizes are rounded to the nearest that the axis may have. What is not compared to anything is a baseline: Li et al.,
    ICLR 2017, arXiv:1608.08710, prune so within a stage.
    """

    name: ClassVar[str] = "uniform"

    def levels(self, problem: Problem) -> Ints:
        """See Allocation."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if problem.cost_at(levels_of(problem, middle)) <= problem.limit:
                low = middle
            else:
                high = middle
        return levels_of(problem, low)

    def worth(self, problem: Problem, levels: Ints) -> Floats:
        """See Allocation: the axis that keeps the smallest share."""
        return -problem.sizes_at(levels) / problem.meter.extents


def levels_of(problem: Problem, keep: float) -> Ints:
    """The places on the ladders nearest to a share of each axis; of two as near the larger size."""
    places = [int(np.argmin(np.abs(sizes - keep * sizes[0]))) for sizes in problem.ladders]
    return np.array(places, np.int64)
