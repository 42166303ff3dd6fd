"""reduce-query-heads: fewer query heads per head of keys, and attention that is converted first."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.cost import cost_model, summary
from graphopt.errors import CannotShrink
from graphopt.passes.query_groups import outer_of
from graphopt.passes.reduce_query_heads import ReduceQueryHeads
from graphopt.shrink import shrink
from tests.passes.reducing import assert_is_masked, prepared, shapes
from tests.programs import assert_same, program_of

WIDTH, HEAD = 32, 4


def grouped(heads: int, groups: int, dead: tuple[int, ...] = ()):
    """Attention with `heads` query heads on `groups` heads of keys; the output ignores the query heads in `dead`."""

    def forward(s, x):
        q, k, v = (layer(x).view(1, 6, -1, HEAD).transpose(1, 2) for layer in (s.q, s.k, s.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=groups < heads)
        return s.out(y.transpose(1, 2).reshape(1, 6, heads * HEAD))

    torch.manual_seed(0)
    layers = {"q": nn.Linear(WIDTH, heads * HEAD), "out": nn.Linear(heads * HEAD, WIDTH)}
    layers |= {name: nn.Linear(WIDTH, groups * HEAD) for name in "kv"}
    for head in dead:
        layers["out"].weight.data[:, head * HEAD : (head + 1) * HEAD] = 0
        layers["q"].weight.data[head * HEAD : (head + 1) * HEAD] *= 0.1
    return program_of(forward, torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(1)), **layers)


def test_keys_and_values_stay():
    """Half of the query heads go; their keys and values do not."""
    after = ReduceQueryHeads(keep=0.5)(grouped(8, 2))
    assert shapes(after) == {
        "q.weight": [16, 32],
        "k.weight": [8, 32],
        "v.weight": [8, 32],
        "out.weight": [32, 16],
    }


def test_each_head_of_keys_drops_its_own():
    """Heads that the output ignores, in other places of each group, go, and nothing changes."""
    before = grouped(8, 2, dead=(0, 3, 5, 6))
    assert_same(before, ReduceQueryHeads(keep=0.5)(before), tolerance=1e-5)


@pytest.mark.parametrize("criterion", ["l2", "wanda", "random"])
def test_result_is_the_masked_program(criterion):
    """Whatever goes, the result equals the original with it masked; criteria without weights choose by place."""
    reduction = ReduceQueryHeads(budget=Budget("macs", 0.93), criterion=criterion)
    for before in (grouped(8, 2), prepared("llama")):
        assert_is_masked(reduction, before, reduction(before))


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 2), (4, 1), (2, 2)])
def test_cost_is_the_formula(heads, groups):
    """Multiply-adds are 2 n^2 Hq d + n W d (2 Hq + 2 Hkv)."""
    macs = 2 * 6 * 6 * heads * HEAD + 6 * WIDTH * HEAD * (2 * heads + 2 * groups)
    assert summary(grouped(heads, groups)).total.macs == macs
    assert cost_model(infer(grouped(heads, groups))).total["macs"]() == macs


def test_one_query_head_each_is_plain_attention():
    """As many query heads as heads of keys: no grouping is left to see."""
    after = ReduceQueryHeads(keep=0.01)(grouped(8, 2))
    axes = infer(after)
    assert not axes.free("query_group")
    assert [axis.extent for axis in axes.free("head")] == [2]


def test_uneven_drops_are_refused_by_name():
    """Another number for one group is no tensor; the message names the group."""
    axes = infer(grouped(8, 2))
    inner = axes.free("query_group")[0]
    with pytest.raises(CannotShrink, match="item 1"):
        shrink(axes, {(outer_of(axes, inner), inner): [[0, 1], [2]]})


@pytest.mark.parametrize("name", ["bert"])
def test_pairs_are_declined_without_kv_heads(name):
    """Heads whose queries and keys are in pairs are left alone, and the record says what to ask for."""
    record = ReduceQueryHeads(keep=0.5)(prepared(name)).records[-1]
    assert any("give kv_heads to convert" in decline.reason for decline in record.declined)


def test_multi_head_attention_is_converted_first():
    """4 heads to 2 of keys and values, then 2 query heads; the budget is that of the original."""
    before = prepared("bert")
    after = ReduceQueryHeads(keep=0.5, kv_heads=2)(before)
    assert [record.name for record in after.records[-2:]] == ["pool-kv-heads", "reduce-query-heads"]
    assert {tuple(shape) for name, shape in shapes(after).items() if ".attention." in name} == {(16, 32), (32, 16)}
    budget = ReduceQueryHeads(budget=Budget("macs", 0.9), kv_heads=2)(before)
    assert summary(budget).total.macs <= 0.9 * summary(before).total.macs
