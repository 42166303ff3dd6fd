"""Passes that shrink axes under a budget: a criterion, an allocation, and `shrink`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.budget import Budget
from graphopt.passes.base import Pass


@dataclass(frozen=True)
class Reduction(Pass):
    """Score the free axes of some roles, decide how many items stay, shrink. Lossy.

    `keep` instead of a budget is the share of every axis that stays.
    """

    lossless: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]]

    budget: Budget | None = None
    keep: float | None = None
    criterion: str = "l2"
    allocation: str = "global"
