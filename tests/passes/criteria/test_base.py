"""From values of tensors to scores of items."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.axes import owner
from graphopt.axes.axis import Axis, concatenation, product
from graphopt.passes.criteria.base import Tally, grouped, members, normalised, sum_onto
from tests.passes.criteria.nets import axes_of, axis_of, seeded, tied
from tests.programs import program_of


def test_sums_over_products_and_concatenations():
    """Every element counts for the item that its index belongs to, wherever the atom stands in a dimension."""
    h, d, c = Axis(3), Axis(2), Axis(4)
    dim = concatenation([product([h, d]), c, h])
    values = seeded(13, 5)
    dims = [dim, Axis(5)]
    for atom in (h, d, c):
        items = owner(dim, atom)
        expected = torch.stack([values[items == n].sum() for n in range(atom.extent)])
        torch.testing.assert_close(sum_onto(values, dims, 0, atom), expected)
        torch.testing.assert_close(Tally([atom]).sums(dims, values)[atom], expected)


def test_square_matrices_over_one_axis_count_once():
    """A matrix whose rows and columns are one axis: an item's elements are its row and column, the corner once."""
    c = Axis(4)
    values = seeded(4, 4)
    expected = values.sum(0) + values.sum(1) - values.diagonal()
    torch.testing.assert_close(Tally([c]).sums([c, c], values)[c], expected)


def test_groups_have_the_elements_of_each_item():
    """(extent, elements of each), in the same order for all items."""
    h, d = Axis(3), Axis(2)
    dim = product([h, d])
    values = seeded(5, 6)
    torch.testing.assert_close(grouped(values, dim, 1, h), values.T.reshape(3, 10))
    torch.testing.assert_close(grouped(values, dim, 1, d), values.T.reshape(3, 2, 5).transpose(0, 1).reshape(2, 15))


def test_tied_tensors_are_one_member():
    """An embedding that is the output layer as well comes once, under every name, and is summed over."""
    axes = tied()
    found = members(axes)
    own = [member for member in found if member.tensor.shape == (20, 8)]
    assert len(own) == 1
    assert own[0].summed[1]


def test_tables_and_statistics_are_no_members():
    """Running statistics, masks and position tables are not what a criterion of weights looks at."""
    parts = {"a": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4).eval()}
    axes = axes_of(
        program_of(lambda s, x: s.norm(s.a(x)) * torch.arange(4.0)[:, None, None], torch.zeros(1, 3, 2, 2), **parts)
    )
    names = {name for member in members(axes) for name in member.names}
    assert names == {"p_a_weight", "p_a_bias", "p_norm_weight", "p_norm_bias"}
    assert axis_of is not None


@pytest.mark.parametrize("how", ["none", "mean", "max", "sum", "gaussian", "lamp"])
def test_scales(how):
    """Scales keep the order; of an axis of zeros nothing breaks."""
    score = seeded(9).abs()
    score[3] = score[5]
    scaled = normalised(score, how)
    assert bool((scaled[score.argsort()].diff() >= -1e-15).all())
    assert scaled[3] == scaled[5]
    assert bool(normalised(torch.zeros(4, dtype=torch.float64), how).isfinite().all())
    assert normalised(score, "mean").mean().item() == pytest.approx(1)
    assert normalised(score, "max").max().item() == pytest.approx(1)
    assert normalised(score, "lamp").max().item() == pytest.approx(1)
