"""`"geometric-median"`: distances between items."""

from __future__ import annotations

import pytest
import torch

from graphopt.passes.criteria import geometric_median
from tests.passes.criteria.nets import attention, axis_of, concatenated, residual, residual_of, score, stored


def naive(vectors):
    """The sum of distances, one pair at a time."""
    return torch.stack([sum((a - b).norm() for b in vectors) for a in vectors])


@pytest.mark.parametrize("pairs", [1 << 24, 7])
def test_all_weights_of_an_item_are_one_vector(pairs, monkeypatch):
    """Rows of what produces the axis and columns of what reads it, side by side; in pieces of any size."""
    monkeypatch.setattr(geometric_median, "_PAIRS", pairs)
    axes = residual()
    vectors = torch.cat(
        [stored(axes, "inner.weight").flatten(1), stored(axes, "outer.weight").transpose(0, 1).flatten(1)], 1
    )
    atom = axis_of(axes, "inner.weight")
    torch.testing.assert_close(score("geometric-median", axes, atom), naive(vectors))
    produced = naive(stored(axes, "inner.weight").flatten(1))
    torch.testing.assert_close(score("geometric-median", axes, atom, ends="producers"), produced)


def test_parts_of_a_concatenation():
    """Each part of a concatenation has its own columns."""
    axes = concatenated()
    columns = stored(axes, "last.weight").transpose(0, 1).flatten(1)
    vectors = torch.cat([stored(axes, "b.weight").flatten(1), columns[4:]], 1)
    torch.testing.assert_close(score("geometric-median", axes, axis_of(axes, "b.weight")), naive(vectors))


def test_heads():
    """A head's vector has its q, k and v, and its part of the output projection."""
    axes = attention()
    weight = stored(axes, "qkv.weight").view(3, 3, 4, 10).transpose(0, 1).flatten(1)
    out = stored(axes, "out.weight").view(10, 3, 4).transpose(0, 1).flatten(1)
    (atom,) = axes.free("head")
    torch.testing.assert_close(score("geometric-median", axes, atom), naive(torch.cat([weight, out], 1)))


def test_what_others_stand_in_for_goes_first():
    """Of a cluster and outliers the middle of the cluster is lowest, however large its weights are."""
    weight = torch.randn(6, 8, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    middle = 10 * weight[0].clone()
    for n in range(4):
        weight[n] = middle + 0.1 * weight[n]
    weight[2] = weight[[0, 1, 3]].mean(0)
    axes = residual_of(inner_weight=weight, outer_weight=torch.zeros(8, 6, 3, 3))
    atom = axis_of(axes, "inner.weight")
    assert int(score("geometric-median", axes, atom).argmin()) == 2
    assert int(score("l1", axes, atom).argmin()) in (4, 5)


def test_equal_items_have_no_distance():
    """Copies are exactly at one place."""
    vectors = [torch.ones(5, 3) * 0.1, torch.ones(5, 2) * 7]
    assert float(geometric_median.distances(vectors, 5).max()) < 1e-6
