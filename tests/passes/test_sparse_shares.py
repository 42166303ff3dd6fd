"""Shares of layers: Global MP is one sort of all weights, its minimum holds, ERK and uniform keep what they shall."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.sparse_grid import Grid
from graphopt.passes.sparse_shares import Ranked, erk, largest, ranked, uniform
from graphopt.sparsity import UNSTRUCTURED, Format

quick = settings(deadline=None, max_examples=50)

shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5)
keeps = st.floats(0, 1)


def layers(shapes, seed=0, form=UNSTRUCTURED, scales=None):
    torch.manual_seed(seed)
    found = []
    for n, (outs, ins) in enumerate(shapes):
        grid = Grid(outs, 1, ins, form)
        scores = torch.rand(outs, ins) * (scales[n] if scales else 1)
        found.append(Ranked(grid, (outs, ins), grid.density(grid.sums(scores))))
    return found


@quick
@given(shapes, keeps, st.integers(0, 50))
def test_global_is_one_sort(shapes, keep, seed):
    """Without a minimum each layer keeps what is among the k highest of all, k = N - int((1 - keep) N)."""
    own = layers(shapes, seed)
    kept = ranked(own, 0.0)(keep)
    everything = torch.cat([layer.density.flatten() for layer in own])
    count = min(len(everything), int(np.ceil(keep * len(everything) - 1e-6)))
    stays = torch.zeros(len(everything), dtype=torch.bool)
    stays[everything.argsort(descending=True)[:count]] = True
    parts = stays.split([layer.grid.size for layer in own])
    assert kept.tolist() == [int(part.sum()) for part in parts]


@quick
@given(shapes, st.floats(0.4, 1), st.integers(0, 50), st.floats(0, 0.2))
def test_every_layer_keeps_the_minimum(shapes, keep, seed, minimum):
    """Each keeps the floor or all it has; and all together what was asked for, where floors allow that, within one."""
    own = layers(shapes, seed, scales=[10.0**-n for n in range(len(shapes))])
    sizes = np.array([layer.grid.size for layer in own])
    floor = int(sizes.sum() * minimum)
    kept = ranked(own, minimum)(keep)
    if keep * sizes.sum() >= np.minimum(sizes, floor).sum():
        assert (kept >= np.minimum(sizes, floor)).all()
        assert abs(kept.sum() - keep * sizes.sum()) <= 1 + 1e-6
    assert (kept <= sizes).all()


def test_scores_of_another_scale_change_a_global_ranking():
    """Magnitudes are compared as they are: a layer that is ten times as large keeps more (a known weakness)."""
    same = ranked(layers([(10, 10), (10, 10)]), 0.0)(0.5)
    scaled = ranked(layers([(10, 10), (10, 10)], scales=[10.0, 1.0]), 0.0)(0.5)
    assert abs(same[0] - same[1]) < 30
    assert scaled[0] >= 90


@quick
@given(shapes, keeps)
def test_uniform(shapes, keep):
    """Every layer keeps its share."""
    own = layers(shapes)
    assert np.allclose(uniform(own, 0.0)(keep), [keep * layer.grid.size for layer in own])


@quick
@given(shapes, keeps)
def test_erk(shapes, keep):
    """All together keep the share, none more than all of it, and those that are not whole in proportion to
    (outs + ins) / (outs ins)."""
    own = layers(shapes)
    sizes = np.array([layer.grid.size for layer in own])
    kept = erk(own, 0.0)(keep)
    assert (kept <= sizes + 1e-6).all()
    assert np.isclose(kept.sum(), keep * sizes.sum())
    raw = np.array([sum(layer.extents) / np.prod(layer.extents) for layer in own])
    partial = kept < sizes - 1e-6
    ratios = (kept / sizes / raw)[partial]
    assert np.allclose(ratios, ratios[0]) if partial.any() else True


@quick
@given(shapes, st.floats(0.05, 1))
def test_blocks_within_one(shapes, keep):
    """Of blocks as many elements stay as were asked for, within one block."""
    own = layers(shapes, form=Format(3, 2))
    sizes = sum(layer.grid.size for layer in own)
    assert -1e-6 <= ranked(own, 0.0)(keep).sum() - keep * sizes <= 6


def test_the_largest_share_within_a_limit():
    """The search ends just below the limit, and at nothing where nothing fits."""
    assert 0.25 - 1e-9 < largest(lambda keep: 4 * keep, 1.0) <= 0.25
    assert largest(lambda keep: keep, 5.0) == 1.0
    assert largest(lambda keep: 2 + keep, 1.0) == 0.0
