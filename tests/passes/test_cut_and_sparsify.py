"""A cut and zeros under one budget: both have their part, the whole is met, and the default is the same factor."""

from __future__ import annotations

import math

import pytest

import graphopt
from graphopt.budget import Budget
from graphopt.cost import summary
from graphopt.errors import BadOption, BudgetNotShared
from graphopt.optimize import optimize
from graphopt.passes import make
from graphopt.passes.cut_and_sparsify import CutAndSparsify
from graphopt.passes.reduction import Reduction
from graphopt.passes.sparsify import Sparsify
from graphopt.program import Program
from tests.passes.reducing import prepared
from tests.passes.sparsifying import nonzeros


def shared(budget: Budget, share: float | None = None, **options: object) -> CutAndSparsify:
    """Channels, then 4x1 blocks."""
    cut, zeros = make("prune-channels"), make("sparsify-blocks", format="4x1", **options)
    assert isinstance(cut, Reduction)
    assert isinstance(zeros, Sparsify)
    return CutAndSparsify(cut, zeros, budget, share)


def left(before: Program, after: Program) -> tuple[float, float]:
    """FLOPs as a share of the original's: of the shapes alone, and without what is zero."""
    full = summary(before).total.flops
    found = summary(after)
    # Blocks at the edges are smaller: what is left is within one of them.
    return found.total.flops / full, round(found.sparse_flops / full, 3)


@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2"])
def test_both_take_the_same_factor(model: str) -> None:
    """Half of the work: shapes of 0.71, and of that 0.29 zero; two records, one pass each."""
    before = prepared(model)
    after = shared(Budget("flops", 0.5))(before)
    shapes, work = left(before, after)
    assert 0.66 < shapes <= math.sqrt(0.5)
    assert 0.49 < work <= 0.5
    assert [record.name for record in after.records[-2:]] == ["prune-channels", "sparsify-blocks"]
    assert {annotation.word for annotation in after.annotations.values()} == {"4x1"}


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_the_cut_leaves_the_share_that_it_is_given(share: float) -> None:
    """Zeros take the rest, whatever the steps of the cut left of it; with 1 there is no cut."""
    before = prepared("resnet18")
    after = shared(Budget("flops", 0.6), share)(before)
    shapes, work = left(before, after)
    assert share - 0.05 < shapes <= share
    assert 0.59 < work <= 0.6


def test_an_amount_is_a_budget_too() -> None:
    """The same as the share that it is of the whole."""
    before = prepared("resnet18")
    whole = summary(before).total.params
    first = shared(Budget("params", 0.25))(before)
    second = shared(Budget("params", 0.25 * whole, absolute=True))(before)
    assert nonzeros(first) == nonzeros(second)
    assert sum(nonzeros(first).values()) <= 0.25 * whole


def test_a_budget_that_is_met_changes_nothing() -> None:
    """Both passes say so."""
    before = prepared("resnet18")
    after = shared(Budget("flops", 2 * summary(before).total.flops, absolute=True))(before)
    assert not any(record.changed for record in after.records[-2:])


def test_the_cut_cannot_leave_so_little() -> None:
    """The error names the share that it can leave, and with that it goes."""
    before = prepared("deit_s")
    cut, zeros = make("prune-heads"), make("sparsify-magnitude")
    assert isinstance(cut, Reduction)
    assert isinstance(zeros, Sparsify)
    with pytest.raises(BudgetNotShared, match=r"prune-heads was to leave 0\.548 of the program") as caught:
        CutAndSparsify(cut, zeros, Budget("params", 0.3))(before)
    least = float(caught.value.way_out.rpartition("=")[2])
    after = CutAndSparsify(cut, zeros, Budget("params", 0.3), least)(before)
    assert sum(nonzeros(after).values()) < 0.3 * summary(before).total.params


def test_kinds_that_are_not_shared_are_refused_first() -> None:
    """Before the cut: a budget of bytes is not for zeros, and latency is for each alone."""
    with pytest.raises(BadOption, match="no budget of bytes"):
        shared(Budget("bytes", 0.5))(prepared("resnet18"))
    with pytest.raises(BadOption, match="cannot share a budget of latency"):
        shared(Budget("latency", 0.5))(prepared("resnet18"))


def test_from_the_front_door() -> None:
    """`optimize` with both passes and one budget; the share as an option of the cut."""
    before = prepared("resnet18")
    for options, shapes in (("", math.sqrt(0.5)), (":share=0.8", 0.8)):
        after = optimize(before, passes=[f"prune-channels{options}", "sparsify-blocks:format=4x1"], flops=0.5)
        assert isinstance(after, graphopt.Program)
        found, work = left(before, after)
        assert shapes - 0.05 < found <= shapes
        assert 0.49 < work <= 0.5
