"""optin: heads and neurons in one shot."""

from __future__ import annotations

import pytest
from torch import nn

from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.capture import capture
from graphopt.cost import summary
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.passes.optin import Optin
from tests.models import TINY
from tests.passes.reducing import assert_is_masked, prepared


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_result_is_the_masked_program(name):
    """The multiply-adds of the shrunk graph are at most 0.8 of the base's, and it equals the masked program."""
    recipe, before = Optin(budget=Budget("macs", 0.8), criterion="optin:samples=1"), prepared(name)
    after = recipe(before)
    assert 0.98 * 0.8 <= summary(after).total.macs / summary(before).total.macs <= 0.8
    assert_is_masked(recipe, before, after)


def test_unused_neurons_go_first():
    """Neurons with zero output weights bend nothing: they leave before any other."""
    model, inputs = TINY["bert"]()
    dead = range(0, 128, 2)
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == 128]:
        linear.weight.data[:, list(dead)] = 0
    before = run_passes(capture(model, inputs), PREPARE, check=False)
    plan = Optin(budget=Budget("macs", 0.8), criterion="optin:samples=1", step=1)
    axes = infer(before)
    for axis, kept in plan.plan(axes).keep.items():
        if axes.role(axis) == "neuron":
            gone = set(range(axis.extent)) - set(kept.tolist())
            assert gone <= set(dead) or set(dead) <= gone
