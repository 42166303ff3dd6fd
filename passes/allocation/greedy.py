"""Walks down the ladders one group at a time, looking at every step at what each group saves there."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphopt.budget import Floats, Ints
from graphopt.passes.allocation.base import Allocation, Problem

# A walk takes about so many looks at the savings; where there are more groups, several leave at each.
_LOOKS = 1500
# Behind every group that saves anything.
_LAST = 1e300


@dataclass(frozen=True)
class Greedy(Allocation):
    """Base of the allocations that weigh what a group loses against what it saves where the program stands."""

    @abstractmethod
    def ranks(self, problem: Problem, levels: Ints, saved: Floats) -> Floats:
        """For the next group of each variable a number: the group with the lowest leaves.

        Args:
            problem: what is to be decided.
            levels: the places on the ladders now.
            saved: the budgeted quantity that the next group of each variable saves now, as a share of the whole
                program's; 0 where there is no next group.
        """

    def levels(self, problem: Problem) -> Ints:
        """See Allocation."""
        return walk(problem, lambda levels, saved: self.ranks(problem, levels, saved))


def walk(problem: Problem, ranks: Callable[[Ints, Floats], Floats]) -> Ints:
    """Down the ladders until the budget is met, the group that `ranks` has lowest first; see Greedy.ranks."""
    levels = np.zeros(len(problem.variables), np.int64)
    several = max(1, int(problem.depth.sum()) // _LOOKS)
    cost = problem.meter.full
    while cost > problem.limit:
        left = levels < problem.depth
        now, after = problem.sizes_at(levels), problem.sizes_at(np.minimum(levels + 1, problem.depth))
        saved = (cost - problem.meter.each(now, after)) / problem.meter.full
        found = np.where(left, np.minimum(ranks(levels, saved), _LAST), np.inf)
        lowest = np.argsort(found, kind="stable")[: min(several, int(left.sum()))]
        levels[lowest] += 1
        cost = problem.cost_at(levels)
    return levels


def next_losses(problem: Problem, levels: Ints) -> Floats:
    """The sum of normal scores of each variable's next group; infinity where there is none."""
    return np.array(
        [own[level] if level < len(own) else np.inf for own, level in zip(problem.losses, levels, strict=True)]
    )


@dataclass(frozen=True)
class LatencyAware(Greedy):
    """Rank groups by what they lose less `eta` times what they save, anew after every removal.

        value(group) = share of all scores that it has - eta * share of the budgeted quantity that it saves

    `eta` 0 ranks by scores alone, a large one by savings. The saving is that at the sizes reached so far, so an axis
    that has become cheap is left alone, and a group that saves nothing on the target (a latency model with steps)
    waits.

    Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency" (NViT), CVPR 2023,
    arXiv:2110.04869. Differs: both sides are shares, so `eta` has no unit (the paper: 5e-4 for scores as they are and
    milliseconds); scores are taken once, not between steps of training; the quantity is that of the budget, so latency
    with --latency and FLOPs with --flops.
    """

    name: ClassVar[str] = "latency-aware"
    eta: float = 1.0

    def ranks(self, problem: Problem, levels: Ints, saved: Floats) -> Floats:
        """See Greedy."""
        total = sum(float(np.abs(scores).sum()) for scores in problem.normal) or 1.0
        return next_losses(problem, levels) / total - self.eta * saved


@dataclass(frozen=True)
class Lapp(Greedy):
    """One threshold for each axis, raised in proportion to what the axis still costs, until the budget is met.

        t(axis) grows by  rate * elasticity(axis),   elasticity = relative change of the cost / of the axis's size
        an item leaves when its score, over the mean score of its axis, is below t(axis)

    This is where a loss of `sum of lost scores + rate * cost` stands still: one more item of any axis would lose as
    much as it saves. Layers that dominate the cost are cut deeper, cheap ones hardly.

    Source: Zhai et al., "LAPP: Layer Adaptive Progressive Pruning for Compressing CNNs from Scratch", arXiv:2309.14157.
    Differs: the paper learns the thresholds by gradient while the network trains, with a FLOPs term in the loss; here
    the network is trained already, the lost score stands for the task's loss, and the thresholds follow from the budget
    without random numbers. No bypass is added.
    """

    name: ClassVar[str] = "lapp"

    def ranks(self, problem: Problem, levels: Ints, saved: Floats) -> Floats:
        """See Greedy. How far the rate must rise before the next group leaves; thresholds never fall, but are
        implied."""
        now = problem.sizes_at(levels)
        width = now - problem.sizes_at(np.minimum(levels + 1, problem.depth))
        means = np.array([np.abs(scores).mean() or 1.0 for scores in problem.normal])
        score = next_losses(problem, levels) / np.maximum(width, 1) / means
        elasticity = saved / np.maximum(width, 1) * problem.meter.extents
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(elasticity > 0, score / elasticity, np.inf)
        return np.where(np.isnan(rate), np.inf, rate)
