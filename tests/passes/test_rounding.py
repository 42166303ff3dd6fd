"""What stays is a multiple of what was asked for; what the target would like yields to the budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from graphopt import targets
from graphopt.axes import Axis, infer
from graphopt.budget import SLACK, Budget
from graphopt.cost import alignment
from graphopt.errors import BudgetUnreachable
from graphopt.passes.prune_embeddings import PruneEmbeddings
from graphopt.passes.prune_neurons import PruneNeurons
from graphopt.passes.rounding import Rounding, nearest_to_budget
from graphopt.program import Program
from tests.passes.reducing import prepared, share
from tests.programs import program_of

WASM = targets.resolve("wasm")


def mlp(*hidden: int) -> Program:
    """Linear layers with these extents between 16 features and 4 classes."""
    sizes = (16, *hidden, 4)
    layers = {f"l{n}": nn.Linear(i, o) for n, (i, o) in enumerate(itertools.pairwise(sizes))}

    def forward(s, x):
        for n in range(len(hidden)):
            x = getattr(s, f"l{n}")(x).relu()
        return getattr(s, f"l{len(hidden)}")(x)

    return program_of(forward, torch.randn(2, 16), **layers)


def test_what_was_asked_for_is_kept_to():
    """Multiples of the step that the user names, however short the axis; with the budget far from used, a note."""
    after = PruneNeurons(budget=Budget("flops", 0.6), step=32)(mlp(64, 96))
    record = after.records[-1]
    assert all(row["to"] % 32 == 0 for row in record.details)
    assert share(after, "flops") <= 0.6
    assert ("is used" in " ".join(record.notes)) == (share(after, "flops") < (1 - SLACK) * 0.6)


def test_axes_that_are_no_longer_than_the_step_are_named():
    """They get what the target wants instead, and the note says which they are and how short."""
    record = PruneNeurons(keep=0.5, step=1000)(mlp(64, 96)).records[-1]
    assert [row["to"] for row in record.details] == [32, 48]
    (note,) = record.notes
    assert "2 axes are no longer than the step of 1000 (l0.weight[0], l1.weight[0]; the shortest has 64)" in note
    assert not PruneNeurons(keep=0.5, step=1)(mlp(64, 96)).records[-1].notes


@pytest.mark.parametrize("target", [None, WASM])
def test_a_single_axis_meets_the_budget(target):
    """One axis of 32, in steps of 8 at most: half of the FLOPs to 2 %, since the steps become finer where they must."""
    reduction = PruneEmbeddings(budget=Budget("flops", 0.5), target=target)
    after = reduction(prepared("deit_s"))
    left = 1 - share(after, "flops") / 0.5
    row = after.records[-1].details[0]
    one_more = PruneEmbeddings(keep=(row["to"] + 1) / row["from"], step=1)(prepared("deit_s"))
    assert 0 <= left <= SLACK or share(one_more, "flops") > 0.5
    assert any("less than the target wants" in decline.reason for decline in after.records[-1].declined)


def test_steps_stay_where_they_meet_the_budget():
    """Long axes are cut to multiples of what the target wants, and there is nothing to say."""
    record = PruneNeurons(budget=Budget("flops", 0.5), target=WASM)(mlp(256, 256, 256)).records[-1]
    assert all(row["to"] % alignment(WASM, "neuron") == 0 for row in record.details)
    assert not record.notes


def test_a_budget_below_the_steps_is_reached_with_finer_ones():
    """Two steps of 8 take more than 3 % of the FLOPs; without steps there is less."""
    with pytest.raises(BudgetUnreachable):
        PruneNeurons(budget=Budget("flops", 0.03), step=8, min_keep=0.01)(mlp(64, 64))
    after = PruneNeurons(budget=Budget("flops", 0.03), min_keep=0.01)(mlp(64, 64))
    assert 0.9 * 0.03 <= share(after, "flops") <= 0.03


def test_the_coarsest_that_is_near_is_taken():
    """Of steps of 8, 4, 2 and 1 the first within 2 %; where none is, a finer one has to be nearer by 1 %."""
    axis = Axis(64)
    first = Rounding({axis: 8})

    def chosen(*left: float) -> int:
        shares = dict(zip((8, 4, 2, 1), left, strict=True))
        return nearest_to_budget(first, lambda trial: ({axis: 1}, shares[trial.steps[axis]]))[2].steps[axis]

    assert chosen(0.01, 0.0, 0.0, 0.0) == 8
    assert chosen(0.3, 0.1, 0.019, 0.0) == 2
    assert chosen(0.3, 0.1, 0.095, 0.092) == 4
    assert chosen(0.3, 0.295, 0.2, 0.18) == 1
    asked = Rounding({axis: 8}, frozenset([axis]))
    assert asked.finer is None


def test_steps_are_also_what_operators_take():
    """An axis of which only multiples of 4 may stay keeps to them when steps become finer."""
    axes = infer(mlp(64))
    (axis,) = axes.free("neuron")
    axes.multiples[axis] = 4  # type: ignore[index]
    assert Rounding({axis: 2}).fitted(axes) == {axis: 4}
    assert Rounding({axis: 8}).fitted(axes) == {axis: 8}
