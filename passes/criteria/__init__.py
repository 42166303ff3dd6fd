"""Criteria: how much each item of an axis matters. One per file or small family; the table is the registry."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.passes.criteria.base import Criterion

CRITERIA: dict[str, str] = {
    "l1": "graphopt.passes.criteria.magnitude:L1",
    "l2": "graphopt.passes.criteria.magnitude:L2",
    "random": "graphopt.passes.criteria.random:Random",
}


def load(name: str) -> type[Criterion]:
    """The class of a registered criterion. Raises KeyError where there is none."""
    module, _, attribute = CRITERIA[name].partition(":")
    return getattr(import_module(module), attribute)


def make(name: str, **options: Any) -> Criterion:
    """A registered criterion with its options. Raises KeyError for an unknown name, TypeError for an unknown option."""
    return load(name)(**options)
