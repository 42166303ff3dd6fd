"""nvit: five classes of structures under one budget."""

from __future__ import annotations

import pytest

from graphopt.axes import infer
from graphopt.budget import Budget
from graphopt.passes.nvit import Nvit
from tests.passes.reducing import assert_is_masked, prepared, share


def test_all_classes_are_cut_in_their_groups():
    """Groups of 16, 2, 8 and 16, smaller ones where an axis has fewer than four of these."""
    axes = infer(prepared("deit_s"))
    recipe = Nvit(budget=Budget("macs", 0.5))
    steps = {axes.role(axis): recipe.step_of(axes, axis) for axis in recipe.pick(axes)}
    assert steps == {"embedding": 16, "head": 2, "head_dim": 8, "neuron": 16}


def test_result_is_the_masked_program():
    """Half of the FLOPs, all classes at once: equal to the original with everything dropped masked."""
    recipe, before = Nvit(budget=Budget("macs", 0.5)), prepared("deit_s")
    after = recipe(before)
    assert share(after, "flops") == pytest.approx(0.5, rel=0.04)
    assert_is_masked(recipe, before, after)


def test_no_class_goes_below_its_group():
    """Two heads and sixteen neurons always stay."""
    after = Nvit(budget=Budget("macs", 0.3))(prepared("deit_s"))
    axes = infer(after)
    assert all(atom.extent >= 2 for atom in axes.free("head"))
    assert all(atom.extent >= 16 for atom in axes.free("neuron", "embedding"))
