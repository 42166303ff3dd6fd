"""DiffRate's search for rates: within the budget, repeatable, and better than rates that nobody searched."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.budget import Budget
from graphopt.edit import Edit
from graphopt.errors import BadOption
from graphopt.passes import PREPARE, make
from graphopt.passes.base import run_passes
from graphopt.passes.diffrate import Diffrate
from graphopt.passes.tokens.job import Job
from graphopt.passes.tokens.rates import _Learned
from graphopt.program import Program
from tests import digits

BATCH = 40


@pytest.fixture(scope="module")
def program() -> Program:
    images = digits.data()[0]
    return run_passes(graphopt.capture(digits.load_vit(), (images[:BATCH],)), PREPARE)


def searched(program: Program, flops: float, labels: bool = False, **options: object) -> Program:
    images, classes, _, _ = digits.data()
    data = [(images[:240], classes[:240])] if labels else [images[:240]]
    return make("diffrate", budget=Budget("flops", flops), schedule="searched", calibration=data, **options)(program)


@pytest.mark.parametrize("labels", [False, True])
def test_searched_rates_answer_more_rightly_than_linear_ones(program: Program, labels: bool) -> None:
    """At 3/4 of the FLOPs the digits transformer loses less than half of what the linear schedule loses; FLOPs are
    within the budget and close to it."""
    small = searched(program, 0.75, labels)
    record = small.records[-1]
    assert 0.68 < record.flops_after / record.flops_before <= 0.75
    linear = make("diffrate", budget=Budget("flops", 0.75))(program)
    dense, unsearched, found = (digits.accuracy(each) for each in (program, linear, small))
    assert dense - found < (dense - unsearched) / 2


def test_search_is_repeatable_and_can_be_given_again(program: Program) -> None:
    """The same seed finds the same; the counts that are said make the same program without a search."""
    one, two = (searched(program, 0.6, steps=12, seed=3) for _ in range(2))
    assert one.records[-1].notes == two.records[-1].notes
    note = one.records[-1].notes[0]
    counts, through = (
        tuple(int(each) for each in note.partition(f"{name}=(")[2].partition(")")[0].split(","))
        for name in ("counts", "through")
    )
    again = make("diffrate", counts=counts, through=through)(program)
    images = {"x": digits.data()[2][:BATCH]}
    assert torch.equal(again.run(images)["output"], one.run(images)["output"])


def test_search_ends_at_other_targets(program: Program) -> None:
    """`keep` stands for what the linear schedule would cost; a budget that the first block alone would break is met."""
    images = digits.data()[0]
    small = Diffrate(keep=0.5, schedule="searched", calibration=[images[:80]], steps=5)(program)
    assert [row["kept"] for row in small.records[-1].details if "kept" in row][-1] <= 8
    tight = searched(program, 0.45, steps=5)
    record = tight.records[-1]
    assert record.flops_after <= 0.45 * record.flops_before


def test_costs_are_differentiated_with_the_right_sign(program: Program) -> None:
    """More weight on candidates with more tokens costs more; the value is the polynomial's at the counts that run."""
    job = Job(Diffrate(keep=0.5), Edit(program))
    model = job.segments("flops")
    rates = _Learned(job, model, 0.7 * model([16, 16, 16]))
    assert rates.fixed == [True, False, False]
    tables, counts = rates()
    through, kept = rates.counted(tables)
    assert [round(count.item()) for count in counts] == kept.sum(1).round().int().tolist()
    cost = model.expected(counts)
    assert cost.item() == model([round(count.item()) for count in counts])
    cost.backward()
    assert rates.logits.grad is not None
    shares = rates.logits.detach().softmax(-1)
    above = rates.candidates - (shares * rates.candidates).sum(-1, keepdim=True)
    # What runs behind a place is what is left when some are merged; that is less than what dropping leaves.
    assert (rates.logits.grad[:, 1] * above[:, 1] > 0).all()
    assert (through.sum(1) >= kept.sum(1)).all()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"schedule": "searched", "keep": 0.5, "reducer": "bipartite"}, "cannot be searched"),
        ({"counts": (9, 5, 3), "through": (9, 5)}, "through"),
        ({"keep": 0.5, "through": (9, 5, 3)}, "through"),
        ({"keep": 0.5, "steps": 0}, "steps"),
        ({"keep": 0.5, "schedule": "found"}, "searched"),
    ],
)
def test_options_that_make_no_sense_are_refused(program: Program, options: dict[str, object], what: str) -> None:
    """Each says what is wrong."""
    with pytest.raises(BadOption, match=what):
        make("diffrate", **options)(program)
