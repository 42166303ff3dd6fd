"""Grids: units cover a matrix, and as many of its elements stay as were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.sparse_grid import Grid, best_of_each
from graphopt.sparsity import Format, blocks_kept, conforms, stored

quick = settings(deadline=None, max_examples=50)

small = st.integers(1, 9)
formats = st.builds(Format, st.integers(1, 5), st.integers(1, 5))


@st.composite
def grids(draw):
    form = draw(formats)
    kernels = draw(st.booleans()) and form.cols == 1
    return Grid(draw(small), draw(st.integers(1, 4)), draw(small), form, kernels)


def drawn(grid: Grid, seed: int) -> torch.Tensor:
    return torch.rand(grid.outs, grid.taps * grid.channels, generator=torch.Generator().manual_seed(seed)) + 0.1


@quick
@given(grids(), st.integers(0, 99))
def test_units_cover_the_matrix_once(grid, seed):
    """Sums of all units are the sum of all elements, their sizes are all elements, odd edges included."""
    scores = drawn(grid, seed)
    sums = grid.sums(scores)
    assert sums.shape == grid.shape == grid.sizes.shape
    torch.testing.assert_close(sums.sum(), scores.sum())
    assert int(grid.sizes.sum()) == grid.size == scores.numel()
    for row, column in np.ndindex(*grid.shape):
        unit = torch.zeros(grid.shape, dtype=torch.bool)
        unit[row, column] = True
        elements = grid.elements(unit)
        assert int(elements.sum()) == grid.sizes[row, column]
        torch.testing.assert_close(scores[elements].sum(), sums[row, column])


@quick
@given(grids(), st.floats(0, 1), st.integers(0, 99))
def test_as_many_stay_as_were_asked_for(grid, keep, seed):
    """Whole units stay, at least as many elements as the share asks for, and less than one unit more."""
    sums = grid.sums(drawn(grid, seed))
    kept = grid.pick(sums, keep * grid.size)
    elements = grid.elements(kept)
    count, asked = int(elements.sum()), keep * grid.size
    assert asked - 1e-5 <= count < asked + int(grid.sizes.max()) or count == asked == 0
    if not grid.kernels:
        assert stored(elements.numpy(), grid.form) == count
        assert np.array_equal(blocks_kept(elements.numpy(), grid.form), kept.numpy())


@quick
@given(grids(), st.floats(0, 1), st.integers(0, 99))
def test_the_best_stay(grid, keep, seed):
    """No unit that goes has a higher mean score than one that stays."""
    sums = grid.sums(drawn(grid, seed))
    kept, density = grid.pick(sums, keep * grid.size), grid.density(sums)
    if kept.any() and not kept.all():
        assert float(density[kept].min()) >= float(density[~kept].max())


@quick
@given(grids(), st.floats(0, 1), st.integers(0, 99))
def test_rows_alike(grid, keep, seed):
    """By row all rows keep as many units, the best of their own."""
    kept = grid.pick(grid.sums(drawn(grid, seed)), keep * grid.size, by_row=True)
    assert len(set(kept.sum(1).tolist())) == 1


@quick
@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 8), st.integers(1, 3), st.data())
def test_n_of_m(outs, ins, m, vector, data):
    """Of each M columns the N best stay, in short last groups up to N; the format recognises it."""
    n = data.draw(st.integers(1, m))
    form = Format(vector, 1, n, m)
    grid = Grid(outs, 1, ins, form)
    scores = drawn(grid, ins)
    kept = grid.pick(grid.sums(scores), 0.0)
    elements = grid.elements(kept)
    if m > 1:
        assert conforms(elements.numpy(), form)
        groups = [min(n, min(m, ins - first)) for first in range(0, ins, m)]
        assert (kept.sum(1) == sum(groups)).all()
        assert int(elements.sum()) == grid.stored(0.0)
    sums = grid.sums(scores)
    for first in range(0, ins, m):
        group = sums[:, first : first + m]
        best = group.topk(min(n, group.shape[1])).values.sum(1)
        torch.testing.assert_close((group * best_of_each(group, n, m)).sum(1), best)


@pytest.mark.parametrize(("keep", "count"), [(0.0, 0), (0.1, 1), (0.7, 7), (0.3, 3), (0.31, 4), (1.0, 10)])
def test_shares_that_are_whole_numbers(keep, count):
    """0.7 of 10 are 7: what floating-point numbers add does not count."""
    kept = Grid(1, 1, 10, Format()).pick(torch.rand(1, 10), keep * 10)
    assert int(kept.sum()) == count
