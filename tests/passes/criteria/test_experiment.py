"""A planted case in which weights alone mislead: what looks at data keeps the units that matter."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.calibration import calibration
from graphopt.passes import criteria
from graphopt.shrink import shrink
from tests.passes.criteria.nets import axes_of, axis_of, seeded, settled
from tests.programs import program_of

LOUD = 6  # of the 12 inputs and of the 16 units; the others have large weights and next to no signal


def data_with(scale):
    """Images whose last channels hardly vary."""
    return [seeded(4, 12, 6, 6, seed=n) * scale[:, None, None] for n in range(6)]


@cache
def planted():
    """Half of the units of a layer have large weights on inputs that are nearly silent."""
    scale = torch.full((12,), 0.01, dtype=torch.float64)
    scale[:LOUD] = 1
    one, two = settled(nn.Conv2d(12, 16, 1)), settled(nn.Conv2d(16, 5, 3), 30)
    with torch.no_grad():
        one.bias.zero_()
        one.weight[:8, LOUD:] = 0
        one.weight[8:, :LOUD] = 0
        one.weight[8:] *= 4
    axes = axes_of(program_of(lambda s, x: s.two(F.relu(s.one(x))).mean((2, 3)), data_with(scale)[0], one=one, two=two))
    return axes, calibration(data_with(scale), axes.program)


def error(name, **options):
    """Relative error of the outputs on other data, with half of the units."""
    axes, data = planted()
    atom = axis_of(axes, "one.weight")
    scores = criteria.make(name, **options).scores(axes, [atom], data)[atom]
    after = shrink(axes, {atom: scores.topk(8).indices.sort().values})
    scale = data[0]["x" if "x" in data[0] else next(iter(data[0]))].std((0, 2, 3))
    (name,) = (spec.name for spec in axes.program.inputs)
    fresh = {name: seeded(4, 12, 6, 6, seed=99) * scale[:, None, None]}
    (whole,), (part,) = axes.program.run(fresh).values(), after.run(fresh).values()
    return float((whole - part).norm() / whole.norm())


@pytest.mark.parametrize("name", ["wanda", "activation", "beta-rank", "taylor", "hessian", "optin"])
def test_data_beats_weights(name):
    """Dropping half of the units by a criterion that sees data costs a small part of what L1 costs."""
    assert error(name) < 0.1 * error("l1")
    assert error(name) < 0.3 * min(error("random", seed=seed) for seed in range(3))


def test_weights_alone_are_misled():
    """L1 keeps exactly the silent units."""
    assert error("l1") > 0.9
