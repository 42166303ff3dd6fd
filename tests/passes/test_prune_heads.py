"""prune-heads: whole heads go; with grouped queries the head of keys takes its queries along."""

from __future__ import annotations

import pytest

from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.passes.prune_heads import PruneHeads
from tests.passes.reducing import assert_is_masked, prepared, shapes, share


def test_query_group_goes_with_its_head_of_keys():
    """Of 2 KV heads of 8 with 2 query heads each, one stays with both of its own."""
    before = prepared("llama")
    after = PruneHeads(keep=0.5)(before)
    now, old = shapes(after), shapes(before)
    changed = {name: (old[name], now[name]) for name in now if old[name] != now[name] and ".0." in name}
    assert sorted(changed.values()) == sorted(
        [([32, 32], [16, 32]), ([16, 32], [8, 32]), ([16, 32], [8, 32]), ([32, 32], [32, 16])]
    )


@pytest.mark.parametrize("name", ["deit_s", "bert", "gpt2", "llama", "swin"])
def test_result_is_the_masked_program(name):
    """Half of the heads of every layer: the result equals the original with these heads masked."""
    reduction, before = PruneHeads(keep=0.5), prepared(name)
    assert_is_masked(reduction, before, reduction(before))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_layers_may_keep_other_numbers(name):
    """A budget takes heads wherever they score lowest, and one always stays."""
    before = prepared(name)
    reduction = PruneHeads(budget=Budget("flops", 0.9))
    after = reduction(before)
    assert share(after, "flops") <= 0.9
    assert all(atom.extent >= 1 for atom in infer(after).free("head"))
    assert_is_masked(reduction, before, after)
