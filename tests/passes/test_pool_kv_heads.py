"""pool-kv-heads: multi-head attention becomes grouped-query attention."""

from __future__ import annotations

import pytest
import torch

from graphopt.axes import infer
from graphopt.errors import BadOption
from graphopt.passes.pool_kv_heads import PoolKvHeads, balanced
from graphopt.passes.repeated_heads import unrepeated
from tests.passes.reducing import prepared, shapes
from tests.passes.test_reduce_query_heads import HEAD, grouped
from tests.programs import assert_same, ops


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
    """Fused projections, attention in several operators and numbers that do not divide are declined."""
    fused = PoolKvHeads(2)(prepared("gpt2")).records[-1]
    assert not fused.changed
    assert all("queries come from the same tensor" in decline.reason for decline in fused.declined)
    assert "cannot share 3" in PoolKvHeads(3)(grouped(8, 8)).records[-1].declined[0].reason
    assert "cannot share 3" in PoolKvHeads(3)(grouped(8, 2)).records[-1].declined[0].reason
    assert "no more heads" in PoolKvHeads(2)(grouped(8, 2)).records[-1].declined[0].reason
    assert "one head of keys" in PoolKvHeads(1)(grouped(8, 1)).records[-1].declined[0].reason
    assert "no attention is one operator" in PoolKvHeads(1)(prepared("hard:gqa_matmul")).records[-1].declined[0].reason
    assert "no more heads" in PoolKvHeads(8)(grouped(8, 8)).records[-1].declined[0].reason


@pytest.mark.parametrize("conversion", ["mean-pool", "group"])
def test_grouped_heads_pool_further(conversion):
    """Eight query heads on four of keys become eight on two and on one; equal ones exactly."""
    after = PoolKvHeads(2, conversion)(grouped(8, 4))
    assert shapes(after)["k.weight"] == [8, 32]
    assert shapes(after)["q.weight"] == [32, 32]
    assert [axis.extent for axis in infer(after).free("query_group")] == [4]
    assert shapes(PoolKvHeads(1, conversion)(after))["v.weight"] == [4, 32]
    before = equal(grouped(8, 4), [[0, 3], [1, 2]] if conversion == "group" else [[0, 1], [2, 3]])
    assert_same(before, PoolKvHeads(2, conversion)(before), tolerance=1e-5)


@pytest.mark.parametrize("name", ["gqa_sdpa", "gqa_repeat", "gqa_expand"])
def test_repeated_heads_pool_further(name):
    """A decoder whose two heads of keys are written out three times each: one is left, for attention to share."""
    before = prepared(f"hard:{name}")
    assert_same(before, unrepeated(before), tolerance=1e-5)
    after = PoolKvHeads(1)(before)
    assert after.records[-1].changed == {"attention": 2}
    assert "repeat_interleave" not in ops(after)
    assert ops(after).count("expand") == ops(prepared("hard:gqa_sdpa")).count("expand")
    keys = [shape for key, shape in shapes(after).items() if "project.1" in key]
    assert keys == [[8, 28], [8, 28]]


def test_repetitions_stay_where_nothing_is_pooled():
    """Nothing to do leaves the program as it is."""
    before = prepared("hard:gqa_expand")
    after = PoolKvHeads(2)(before)
    assert str(after) == str(before)
    assert unrepeated(grouped(4, 4)).records == ()


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
