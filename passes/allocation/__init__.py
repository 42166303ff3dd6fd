"""Allocations: how many items of each axis stay, so that a budget is met. The table is the registry."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.passes.allocation.base import Allocation

ALLOCATIONS: dict[str, str] = {
    "uniform": "graphopt.passes.allocation.uniform:Uniform",
    "global": "graphopt.passes.allocation.ranked:Global",
    "minimum-threshold": "graphopt.passes.allocation.minimum_threshold:MinimumThreshold",
    "latency-aware": "graphopt.passes.allocation.greedy:LatencyAware",
    "lapp": "graphopt.passes.allocation.greedy:Lapp",
    "sensitivity": "graphopt.passes.allocation.sensitivity:Sensitivity",
    "two-lists": "graphopt.passes.allocation.two_lists:TwoLists",
}


def load(name: str) -> type[Allocation]:
    """The class of a registered allocation. Raises KeyError where there is none."""
    module, _, attribute = ALLOCATIONS[name].partition(":")
    return getattr(import_module(module), attribute)


def make(name: str, **options: Any) -> Allocation:
    """A registered allocation with its options. Raises KeyError, TypeError as `criteria.make`."""
    return load(name)(**options)
