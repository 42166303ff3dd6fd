"""prune-head-dims: heads get narrower, and attention keeps its scale."""

from __future__ import annotations

import pytest

from graphopt.budget import Budget
from graphopt.passes.prune_head_dims import PruneHeadDims
from tests.passes.reducing import assert_is_masked, prepared, shapes, share


def test_queries_and_values_may_keep_other_sizes():
    """q and k share one size, v and the output projection another."""
    before = prepared("bert")
    after = PruneHeadDims(budget=Budget("flops", 0.9), step=1, include=("d0", "d1"), criterion="random:seed=3")(before)
    rows = {row["axis"]: row["to"] for row in after.records[-1].details}
    assert rows["d0"] != rows["d1"]
    sizes = {name: shape[0] for name, shape in shapes(after).items() if name.startswith("blocks.0.") and shape[1] == 32}
    assert {4 * rows["d0"], 4 * rows["d1"]} <= set(sizes.values())


@pytest.mark.parametrize("name", ["deit_s", "bert", "gpt2", "llama", "swin"])
def test_result_is_the_masked_program(name):
    """Half of every head: the result equals the original with these dimensions masked and its scale."""
    reduction, before = PruneHeadDims(keep=0.5), prepared(name)
    assert_is_masked(reduction, before, reduction(before))


def test_budget():
    """The budget is met where it can be."""
    after = PruneHeadDims(budget=Budget("macs", 0.85), step=1)(prepared("bert"))
    assert share(after, "flops") < 0.87
