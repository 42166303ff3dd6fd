"""`"random"`: the control."""

from __future__ import annotations

import torch

from graphopt.passes import criteria
from tests.passes.criteria.nets import residual, score


def test_the_seed_decides():
    """The same seed gives the same scores whatever else is asked for; another seed gives others."""
    axes = residual()
    free = axes.free()
    together = criteria.make("random").scores(axes, free, None)
    for atom in free:
        assert torch.equal(together[atom], score("random", axes, atom))
        assert not torch.equal(together[atom], score("random", axes, atom, seed=1))
        assert bool((together[atom] >= 0).all())
        assert bool((together[atom] < 1).all())
    assert len({tuple(scores.tolist()[:3]) for scores in together.values()}) == len(free)


def test_single_weights():
    """Weights get values of their own, by their name, for what sparsifies."""
    axes = residual()
    found = {member.names: values for member, values in criteria.make("random").elements(axes, None)}
    again = {member.names: values for member, values in criteria.make("random").elements(axes, None)}
    assert all(torch.equal(values, again[names]) for names, values in found.items())
    assert all(float(values.min()) >= 0 and float(values.max()) < 1 for values in found.values())
    other = next(criteria.make("random", seed=1).elements(axes, None))
    assert not torch.equal(other[1], found[other[0].names])
