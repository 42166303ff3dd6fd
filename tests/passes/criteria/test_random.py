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
