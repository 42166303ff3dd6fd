"""Query heads that share a head of keys and values: which belong to which, and a score for every single one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.axes import Axes, Axis, atoms, owner, results_of
from graphopt.axes.axis import parts
from graphopt.axes.choice import why_not_choose
from graphopt.passes.criteria.base import Criterion, Elementwise

if TYPE_CHECKING:
    from graphopt.calibration import Calibration


def rows_of(
    axes: Axes, criterion: Criterion, scores: Mapping[Axis, Tensor], data: Calibration | None
) -> dict[Axis, Tensor]:
    """The scores, with a row for every head of keys where an axis of query groups may be cut by rows.

    That takes a criterion with a value for every weight. The rows of an axis add up to as much as its scores do.
    """
    pairs = []
    for axis in scores:
        outer = outer_of(axes, axis) if axes.role(axis) == "query_group" else None
        if outer is not None and why_not_choose(axes, outer, axis) is None:
            pairs.append((outer, axis))
    if not pairs or not isinstance(criterion, Elementwise):
        return dict(scores)
    found = dict(scores)
    for axis, rows in pair_scores(axes, criterion, pairs, data).items():
        total = float(rows.sum())
        found[axis] = rows * (float(scores[axis].sum()) / total) if total > 0 else rows
    return found


def outer_of(axes: Axes, inner: Axis) -> Axis | None:
    """The heads of keys that a query group belongs to: the factor in front of it, wherever it is one of a product."""
    for dims in axes.dims.values():
        for own in results_of(dims):
            for axis in own:
                factors = parts(axis, "product")
                for before, after in itertools.pairwise(factors):
                    if after is inner and before.kind is None:
                        return before
    return None


def pair_scores(
    axes: Axes, criterion: Elementwise, pairs: Sequence[tuple[Axis, Axis]], data: Calibration | None
) -> dict[Axis, Tensor]:
    """The sum of an elementwise criterion over what belongs to each pair of items: (outer, inner), by inner axis."""
    found = {inner: torch.zeros(outer.extent * inner.extent, dtype=torch.float64) for outer, inner in pairs}
    for member, values in criterion.elements(axes, data):
        for outer, inner in pairs:
            for place, axis in enumerate(member.dims):
                if inner not in atoms(axis) or outer not in atoms(axis):
                    continue
                first, second = owner(axis, outer), owner(axis, inner)
                own = (first >= 0) & (second >= 0)
                others = [n for n in range(values.dim()) if n != place]
                line = values.double().sum(others) if others else values.double()
                found[inner].index_add_(0, (first * inner.extent + second)[own], line[own])
    return {inner: found[inner].reshape(outer.extent, inner.extent) for outer, inner in pairs}
