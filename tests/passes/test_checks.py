"""Options without sense and patterns without matches are refused, and passes that do nothing say why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.budget import Budget
from graphopt.errors import BadOption, BudgetUnreachable, NothingToCut
from graphopt.passes.checks import listed, matches
from graphopt.passes.decompose_experts import DecomposeExperts
from graphopt.passes.drop_blocks import DropBlocks
from graphopt.passes.factor_block_diagonal import FactorBlockDiagonal
from graphopt.passes.factor_low_rank import FactorLowRank
from graphopt.passes.merge_experts import MergeExperts
from graphopt.passes.prune import Prune
from graphopt.passes.prune_heads import PruneHeads
from graphopt.passes.prune_neurons import PruneNeurons
from graphopt.record import Record
from tests.passes.reducing import prepared
from tests.programs import program_of


def linear():
    """A single layer between input and output: nothing of it may go."""
    return program_of(lambda s, x: s.a(x), torch.randn(2, 8), a=nn.Linear(8, 8))


@pytest.mark.parametrize(
    "made",
    [
        MergeExperts(groups=0),
        MergeExperts(groups=-2),
        MergeExperts(groups=float("nan")),
        MergeExperts(keep=0),
        MergeExperts(groups=2, capacity=0),
        DecomposeExperts(rank=0),
        DecomposeExperts(keep=2.0),
        DecomposeExperts(rank=2, rows=1.5),
        FactorLowRank(rank=0),
        FactorLowRank(keep=0.0),
        FactorLowRank(rank=4, step=0),
        FactorBlockDiagonal(rank=4, blocks=0),
        DropBlocks(drop=0),
        DropBlocks(keep=1.5),
        PruneNeurons(keep=float("nan")),
        PruneNeurons(keep=0.5, step=0),
    ],
    ids=lambda made: f"{made.name} {next(value for value in vars(made).values() if value is not None)}",
)
def test_numbers_without_sense_are_refused(made):
    """A rank or number of 0, a share above 1 or that is none: before anything is looked at, with what would do."""
    with pytest.raises(BadOption) as caught:
        made(linear())
    assert "give" in caught.value.way_out


@pytest.mark.parametrize(
    "made",
    [
        Prune(keep=0.5, include=("nothing*",)),
        FactorLowRank(keep=0.5, include=("nothing*",)),
        DropBlocks(drop=1, include=("nothing*",)),
    ],
    ids=lambda made: made.name,
)
def test_include_without_match_is_refused(made):
    """The error has the pattern, and what it could have matched."""
    with pytest.raises(BadOption, match=r"include nothing\* matches no") as caught:
        made(prepared("deit_s"))
    assert "blocks.0" in caught.value.way_out or "blocks.1" in caught.value.way_out


@pytest.mark.parametrize(
    "made",
    [
        Prune(keep=0.5, exclude=("nothing*",)),
        FactorLowRank(keep=0.2, exclude=("nothing*",)),
        DropBlocks(drop=1, exclude=("nothing*",)),
    ],
    ids=lambda made: made.name,
)
def test_exclude_without_match_is_said(made):
    """A slip of the pen in exclude cuts what was to be left alone, so there is a note; the pass goes on."""
    record = made(prepared("deit_s")).records[-1]
    assert record.total
    assert any("exclude nothing* matches no" in note for note in record.notes)


def test_patterns_look_at_all_outputs_of_tensors():
    """An axis that several tensors have as an output goes by any of them; what is listed matches as it is written."""
    before = prepared("llama")
    for pattern in ("blocks.0.gate.*", "blocks.0.up.*", "blocks.0.up.weight[0]", "n0"):
        record = PruneNeurons(keep=0.5, include=(pattern,))(before).records[-1]
        assert record.changed == {"neuron axis": 1}
        assert not record.notes
    after = PruneNeurons(keep=0.5, exclude=("blocks.*.up.*",))(before)
    assert not after.records[-1].changed
    assert not after.records[-1].notes
    assert matches("fc.weight[0]", ("fc.weight[0]",))
    assert listed(map(str, range(10))) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


@pytest.mark.parametrize(
    "made",
    [
        PruneHeads(budget=Budget("flops", 0.5)),
        Prune(budget=Budget("flops", 0.5), exclude=("*",)),
        FactorLowRank(budget=Budget("flops", 0.5)),
        DropBlocks(budget=Budget("flops", 0.5)),
    ],
    ids=lambda made: made.name,
)
def test_a_budget_with_nothing_to_cut(made):
    """It is said what the pass looked for; `ask for 1` would be no help."""
    with pytest.raises(NothingToCut, match=f"{made.name} finds nothing to cut") as caught:
        made(linear())
    assert isinstance(caught.value, BudgetUnreachable)
    assert "ask for" not in caught.value.way_out


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (PruneHeads(keep=0.5), "no free axis of role head"),
        (Prune(keep=0.5, exclude=("*",)), "no free axis of role"),
        (PruneNeurons(budget=Budget("flops", 1.0)), "the budget is met as it is: 1 of the 1 flops"),
        (MergeExperts(groups=2), "no mixture of experts"),
        (DropBlocks(drop=1), "no residual block"),
        (FactorLowRank(rank=2), "no linear layer of a feed-forward network"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_pass_that_does_nothing_says_why(made, says):
    """In what is printed without --explain."""
    (remark,) = made(linear()).records[-1].remarks
    assert remark.startswith("it changed nothing: ")
    assert says in remark


def test_remarks_are_few():
    """Of many reasons three are said, the last first: that is the one about all of the program."""
    from graphopt.errors import Decline

    record = Record("made-up", declined=tuple(Decline(f"layer{n}", "too small") for n in range(5)), notes=("a note",))
    assert record.remarks == [
        "a note",
        "it changed nothing: layer4: too small; layer3: too small; layer2: too small; and 2 more, see --explain",
    ]
    assert Record.from_json(record.to_json()) == record
    assert Record("made-up", changed={"axis": 1}).remarks == []


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (DropBlocks(budget=Budget("flops", 0.9)), "a block goes whole"),
        (FactorLowRank(budget=Budget("params", 0.9), step=16), "no multiples of the step come nearer"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_coarse_passes_say_how_much_they_use(made, says):
    """Blocks and ranks in large steps cannot come within 2 % of every budget: what is left is noted, and no more."""
    before = prepared("deit_s")
    record = made(before).records[-1]
    used = getattr(record, f"{made.budget.kind}_after") / getattr(record, f"{made.budget.kind}_before")
    assert used <= 0.9
    assert [says in note for note in record.notes] == [True] * (used < 0.98 * 0.9)
    assert used < 0.98 * 0.9, "made to be coarse"
