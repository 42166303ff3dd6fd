"""prune: channels, neurons and heads under one budget."""

from __future__ import annotations

import pytest

from graphopt.budget import Budget
from graphopt.errors import BadOption
from graphopt.passes.prune import Prune
from tests.models import TINY
from tests.passes.reducing import assert_is_masked, prepared, share


@pytest.mark.parametrize("name", TINY)
def test_result_is_the_masked_program(name):
    """Whatever the model: the budget is met, and the result equals the original with the dropped items masked."""
    reduction, before = Prune(budget=Budget("flops", 0.7)), prepared(name)
    after = reduction(before)
    assert share(after, "flops") <= 0.7
    assert_is_masked(reduction, before, after)


def test_roles_take_part_by_name():
    """Only the axes of the roles named are cut."""
    after = Prune(keep=0.5, axes=("head",))(prepared("bert"))
    assert {row["role"] for row in after.records[-1].details} == {"head"}
    after = Prune(keep=0.5)(prepared("bert"))
    assert {row["role"] for row in after.records[-1].details} == {"head", "neuron"}


def test_no_such_role():
    """A role that there is none of is refused, with those that there are."""
    with pytest.raises(BadOption, match="no axes of role tail"):
        Prune(keep=0.5, axes=("tail",))(prepared("bert"))
