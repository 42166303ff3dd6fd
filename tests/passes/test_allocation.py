"""Allocations: each against what it claims, and all of them against every kind of budget on every model."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from graphopt import targets
from graphopt.axes import Axis, infer
from graphopt.budget import KINDS, SLACK, Budget, Meter
from graphopt.errors import BudgetUnreachable
from graphopt.passes.allocation import ALLOCATIONS, load, make
from graphopt.passes.allocation.base import Problem, ladder, top
from graphopt.passes.allocation.minimum_threshold import raised
from graphopt.passes.prune import Prune
from graphopt.passes.prune_neurons import PruneNeurons
from graphopt.passes.rounding import fitted_step
from tests.models import TINY
from tests.passes.reducing import prepared
from tests.programs import program_of

FAST = [name for name in ALLOCATIONS if not load(name).needs_calibration]


class Roles:
    """As much of Axes as allocations look at."""

    def __init__(self, roles):
        self.roles = roles
        self.program = type("Named", (), {"name": "made-up"})()

    def role(self, axis):
        return self.roles.get(axis, "")


def problem(scores, cost, limit, *, step=1, floor=1, comparable=True, heads=()):
    """A made-up problem: scores by axis, a cost of sizes (k, axes) -> (k,), and a share of it."""
    axes = [Axis(len(own)) for own in scores]
    gauge = Meter(axes, lambda sizes: np.asarray(cost(sizes), np.float64))
    return Problem(
        axes=Roles({axes[n]: "head" for n in heads}),
        scores={axis: torch.tensor(own, dtype=torch.float64) for axis, own in zip(axes, scores, strict=True)},
        comparable=comparable,
        meter=gauge,
        limit=limit * gauge.full,
        step=dict.fromkeys(axes, step),
        floor=dict.fromkeys(axes, floor),
    )


def sizes(name, given):
    """What an allocation decides, in the order of the axes."""
    return list(make(name).sizes(given, Budget("params", given.limit, absolute=True)).values())


def random_scores(*extents, seed=0):
    return [np.random.default_rng(seed).random(extent).tolist() for extent in extents]


# On every model -------------------------------------------------------------------------------------------------------


@cache
def decided(model, kind, allocation, step, amount):
    """Sizes by axis label, and the share of the budgeted quantity that they leave."""
    reduction = Prune(
        budget=Budget(kind, amount), allocation=allocation, step=step, target=targets.resolve("cpu:haswell")
    )
    axes = infer(prepared(model))
    plan = reduction.plan(axes)
    gauge = reduction.gauge(axes, tuple(plan.scores))
    return {axis.label: (axis.extent, size) for axis, size in plan.cut.items()}, gauge(plan.cut) / gauge.full, plan


@pytest.mark.parametrize("allocation", FAST)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", TINY)
def test_budgets_are_met(model, kind, allocation):
    """Never above the limit, and not more than 2 % below: or a note says so, which it may only with few axes."""
    amount = 0.8 if kind == "latency" else 0.6
    for step in (1, "auto"):
        try:
            found, share, plan = decided(model, kind, allocation, step, amount)
        except BudgetUnreachable as error:
            least = float(str(error.fields["least"]))
        else:
            least = 0.0
        if least:
            assert least > amount
            continue
        assert share <= amount
        said = any("is used" in note for note in plan.notes)
        assert said == (share < (1 - SLACK) * amount)
        assert not said or len(found) <= 4 or kind == "latency", f"{share:.3f} of {amount}"
        assert all(1 <= size < extent for extent, size in found.values())


def test_sensitivity_meets_budgets():
    """The one that measures, on a model of each kind."""
    for model, kind in (("mobilenet_v1", "flops"), ("bert", "params")):
        _, share, _ = decided(model, kind, "sensitivity", 1, 0.6)
        assert (1 - SLACK) * 0.6 <= share <= 0.6


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_same_every_time(allocation):
    """Decided twice, decided alike."""
    first = decided("mobilenet_v1", "flops", allocation, "auto", 0.5)[0]
    decided.cache_clear()
    assert decided("mobilenet_v1", "flops", allocation, "auto", 0.5)[0] == first


def test_extents_are_what_the_target_wants():
    """AVX2 has eight lanes: multiples of 8 for axes of 32 and more, of less for shorter ones."""
    found, _, _ = decided("resnet50", "flops", "global", "auto", 0.5)
    assert found
    assert all(size % fitted_step(8, extent) == 0 for extent, size in found.values())


# On made-up problems --------------------------------------------------------------------------------------------------


def test_ladder():
    """The extent, then multiples of the step down to the floor."""
    assert ladder(20, 8, 1).tolist() == [20, 16, 8]
    assert ladder(16, 8, 9).tolist() == [16]
    assert ladder(3, 1, 0).tolist() == [3, 2, 1]


def test_step_fits_the_axis():
    """At least four steps, else half of it, down to 1."""
    assert [fitted_step(16, extent) for extent in (64, 63, 32, 10, 4, 3)] == [16, 8, 8, 2, 1, 1]
    assert fitted_step(7, 20) == 1


def test_top_keeps_order_and_breaks_ties_by_place():
    """Of equal scores the first stay; indices ascend."""
    assert top(torch.tensor([1.0, 3.0, 1.0, 3.0]), 3).tolist() == [0, 1, 3]


def test_global_is_the_brute_force_sort():
    """With a cost of one for each item, what stays is what sorting all scores together keeps."""
    scores = random_scores(30, 50, 20)
    everything = sorted(((value, n) for n, own in enumerate(scores) for value in own), reverse=True)
    for share in (0.9, 0.5, 0.2):
        kept = [n for _, n in everything[: int(100 * share)]]
        assert sizes("global", problem(scores, lambda s: s.sum(1), share)) == [kept.count(n) for n in range(3)]


def test_global_depends_on_scale_unless_scores_are_not_comparable():
    """Scores ten times larger in one axis change everything; divided by their mean, nothing."""
    scores = random_scores(40, 40)
    larger = [scores[0], [10 * value for value in scores[1]]]

    def cost(s):
        return s.sum(1)

    assert sizes("global", problem(scores, cost, 0.5)) != sizes("global", problem(larger, cost, 0.5))
    given = [sizes("global", problem(own, cost, 0.5, comparable=False)) for own in (scores, larger)]
    assert given[0] == given[1]


def test_floor_holds_and_the_next_leave():
    """An axis that scores nothing keeps its floor; others make up for it."""
    given = problem([[0.0] * 20, random_scores(20)[0]], lambda s: s.sum(1), 0.4, floor=5)
    assert sizes("global", given) == [5, 11]


def test_minimum_threshold_by_hand():
    """Layers below the floor stay whole, layers that fell below it are raised, the others scaled; the total stays."""
    extents, removed = np.array([100, 100, 5]), np.array([98, 40, 4])
    shares = raised(extents, removed, 10)
    assert shares[2] == 0
    assert shares[0] == pytest.approx(0.9)
    assert (shares * extents).sum() == pytest.approx(142)
    assert raised(extents, np.array([0, 0, 0]), 10).tolist() == [0, 0, 0]
    most = raised(extents, extents, 10)  # cannot be had: as much as floors allow
    assert (most * extents).sum() == pytest.approx(180)


def test_minimum_threshold_keeps_its_floor():
    """Half a percent of all items at least, where a global ranking leaves one."""
    scores = [[0.001] * 200, random_scores(800)[0]]
    given = problem(scores, lambda s: s.sum(1), 0.6)
    assert sizes("global", given)[0] == 1
    assert sizes("minimum-threshold", given)[0] >= 5


def test_latency_aware_extremes():
    """eta 0 removes the lowest scores; a large one what saves most."""
    given = problem([[5.0] * 10, [1.0] * 10], lambda s: 3 * s[:, 0] + s[:, 1], 34 / 40)
    assert given.sizes_at(make("latency-aware", eta=0.0).levels(given)).tolist() == [10, 4]
    assert given.sizes_at(make("latency-aware", eta=1e6).levels(given)).tolist() == [8, 10]


def test_lapp_cuts_deeper_what_costs_more():
    """Of two axes with the same scores the one with most of the cost loses more; alike in cost, both the same."""
    scores = random_scores(40) * 2
    unequal = sizes("lapp", problem(scores, lambda s: 9 * s[:, 0] + s[:, 1], 0.7))
    assert unequal[0] < unequal[1]
    equal = sizes("lapp", problem(scores, lambda s: s[:, 0] + s[:, 1], 0.7))
    assert abs(equal[0] - equal[1]) <= 1
    scaled = [scores[0], [7 * value for value in scores[1]]]
    assert sizes("lapp", problem(scaled, lambda s: s[:, 0] + s[:, 1], 0.7)) == equal


def test_two_lists_is_optimal():
    """Where heads cost the same and neurons do, no other choice within the floors keeps more score."""
    for seed in range(5):
        scores = random_scores(4, 4, 6, 6, seed=seed)

        def cost(s):
            return 7 * (s[:, 0] + s[:, 1]) + 3 * (s[:, 2] + s[:, 3])

        given = problem(scores, cost, 0.55, heads=(0, 1))
        ranked = [sorted(own, reverse=True) for own in scores]

        def worth(kept, ranked=ranked):
            return sum(sum(own[:size]) for own, size in zip(ranked, kept, strict=True))

        every = itertools.product(*(range(1, len(own) + 1) for own in scores))
        best = max(worth(k) for k in every if cost(np.array([k]))[0] <= given.limit)
        levels = make("two-lists").levels(given)
        assert worth(given.sizes_at(levels)) == pytest.approx(best)


def test_uniform_keeps_shares():
    """Every axis keeps the same share, to a step."""
    found = sizes("uniform", problem(random_scores(40, 80, 160), lambda s: s[:, 0] * s[:, 1] + s[:, 1] * s[:, 2], 0.25))
    assert [size / extent for size, extent in zip(found, (40, 80, 160), strict=True)] == pytest.approx(
        [0.5] * 3, abs=0.03
    )


def test_sensitivity_spares_what_matters():
    """Of two axes that cost the same, the one that the output hardly depends on is cut."""

    def forward(s, x):
        return s.a2(s.a1(x).relu()) + 0.001 * s.b2(s.b1(x).relu())

    torch.manual_seed(0)
    layers = {name: nn.Linear(*((8, 32) if name[1] == "1" else (32, 8))) for name in ("a1", "a2", "b1", "b2")}
    program = program_of(forward, torch.randn(4, 8), **layers)
    rows = PruneNeurons(budget=Budget("macs", 0.6), allocation="sensitivity", step=1)(program).records[-1].details
    assert [row["where"] for row in rows] == ["b1.weight[0]"]


@pytest.mark.parametrize("allocation", FAST)
def test_what_is_met_already_is_left_alone(allocation):
    """A budget above the program's cost cuts nothing."""
    assert sizes(allocation, problem(random_scores(8, 8), lambda s: s.sum(1), 1.0)) == [8, 8]


@pytest.mark.parametrize("allocation", FAST)
def test_least_reachable_is_said(allocation):
    """Below the floors there is nothing; the error gives what they cost."""
    with pytest.raises(BudgetUnreachable, match="the least reachable is 4"):
        sizes(allocation, problem(random_scores(8, 8), lambda s: s.sum(1), 0.1, floor=2))
