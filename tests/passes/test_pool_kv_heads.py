"""pool-kv-heads: multi-head attention becomes grouped-query attention."""

from __future__ import annotations

import pytest
import torch

from graphopt.axes import infer
from graphopt.errors import BadOption
from graphopt.passes.pool_kv_heads import PoolKvHeads, balanced
from tests.passes.reducing import prepared, shapes
from tests.passes.test_reduce_query_heads import HEAD, grouped
from tests.programs import assert_same


def test_four_heads_share_two():
    """Keys and values shrink, queries and output stay."""
    after = PoolKvHeads(2)(grouped(8, 8))
    assert shapes(after) == {
        "q.weight": [32, 32],
        "k.weight": [8, 32],
        "v.weight": [8, 32],
        "out.weight": [32, 32],
    }
    assert [axis.extent for axis in infer(after).free("query_group")] == [4]


def equal(program, groups: list[list[int]]):
    """The same program with keys and values equal within groups of heads."""
    edit = program.copy()
    names = {s.arg.name: s.target for s in edit.exported.graph_signature.input_specs}
    for target in names.values():
        if target is not None and target[0] in "kv":
            value = edit.exported.state_dict[target].detach().clone()
            heads = value.view(-1, HEAD, *value.shape[1:])
            for group in groups:
                heads[group] = heads[group[0]].clone()
            edit.exported.state_dict[target] = torch.nn.Parameter(value)
    return edit


@pytest.mark.parametrize("conversion", ["mean-pool", "group"])
def test_equal_heads_pool_exactly(conversion):
    """Heads with equal keys and values within groups: nothing changes."""
    before = equal(grouped(8, 8), [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert_same(before, PoolKvHeads(2, conversion)(before), tolerance=1e-5)


def test_grouping_finds_equal_heads_wherever_they_are():
    """Equal heads that are not neighbours: pooled exactly by similarity, not by place."""
    before = equal(grouped(8, 8), [[0, 2, 5, 7], [1, 3, 4, 6]])
    assert_same(before, PoolKvHeads(2, "group")(before), tolerance=1e-5)
    record = PoolKvHeads(2, "group")(before).records[-1]
    assert record.details[0]["groups"] == "0+2+5+7 1+3+4+6"
    with pytest.raises(AssertionError):
        assert_same(before, PoolKvHeads(2)(before), tolerance=1e-3)


def test_pooling_is_the_mean():
    """The new weights are the means of the old ones."""
    before, after = grouped(4, 4), PoolKvHeads(1)(grouped(4, 4))
    old, new = (next(t for n, t in p.tensors.items() if "k_weight" in n) for p in (before, after))
    torch.testing.assert_close(new, old.view(4, HEAD, -1).mean(0))


def test_what_is_left_alone_says_why():
    """Fused projections, grouped attention and numbers that do not divide are declined."""
    fused = PoolKvHeads(2)(prepared("gpt2")).records[-1]
    assert not fused.changed
    assert all("queries come from the same tensor" in decline.reason for decline in fused.declined)
    assert "cannot share 3" in PoolKvHeads(3)(grouped(8, 8)).records[-1].declined[0].reason
    assert "already" in PoolKvHeads(2)(grouped(8, 2)).records[-1].declined[0].reason
    assert "no more heads" in PoolKvHeads(8)(grouped(8, 8)).records[-1].declined[0].reason


def test_groups_are_balanced():
    """Every group has as many items."""
    groups = balanced(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), 3)
    assert sorted(item for group in groups for item in group) == list(range(12))
    assert [len(group) for group in groups] == [3, 3, 3, 3]


@pytest.mark.parametrize("kv_heads", [None, 0])
def test_number_must_be_given(kv_heads):
    """Without a number of heads there is nothing to do, and the error says so."""
    with pytest.raises(BadOption, match="kv_heads is"):
        PoolKvHeads(kv_heads)(grouped(4, 4))
