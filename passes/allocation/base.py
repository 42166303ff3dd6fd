"""What an allocation is: from scores and a budget to how many items of each axis stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.axes import Axes, Axis

Sizes = Mapping[Axis, int]


@dataclass(frozen=True)
class Problem:
    """What is to be decided.

    `cost` gives the budgeted quantity when axes have these sizes (those that are missing stay whole); `limit` is the
    most it may be. `step[axis]` is the multiple that the target wants of what stays, `floor[axis]` the least that may stay
    (both in items). `scores` are the criterion's, `comparable` whether they may be ranked across axes as they are.
    """

    axes: Axes
    scores: Mapping[Axis, Tensor]
    comparable: bool
    cost: Callable[[Sizes], float]
    limit: float
    step: Mapping[Axis, int]
    floor: Mapping[Axis, int]


@dataclass(frozen=True)
class Allocation(ABC):
    """Decides sizes. Options are fields."""

    name: ClassVar[str]

    @abstractmethod
    def sizes(self, problem: Problem) -> dict[Axis, int]:
        """How many items of each scored axis stay; `cost` of it meets `limit`.

        Raises:
            BudgetUnreachable: even with every axis at its floor it is not met; gives what would be.
        """
