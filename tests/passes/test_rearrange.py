"""Rearrangement: what a move is worth is known exactly, no move makes it worse, planted structure is found."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.axes import atoms, index, infer
from graphopt.passes.rearrange import Role, Work, best_order, exchanged, role_of
from graphopt.passes.sparse_grid import Grid
from graphopt.sparsity import Format
from tests.passes.sparsifying import convnet

quick = settings(deadline=None, max_examples=50)

FORMATS = [Format(4, 1), Format(2, 2), Format(1, 4), Format(1, 1, 2, 4), Format(1, 1, 1, 4), Format(3, 1, 2, 4)]


def role(own, rows):
    """The axis that is all of the rows or the channels."""
    return Role(own, rows, torch.arange(own.grid.outs if rows else own.grid.channels)[None])


def work(form, outs=12, channels=8, taps=1, keep=0.4, seed=0, kernels=False):
    torch.manual_seed(seed)
    grid = Grid(outs, taps, channels, form, kernels)
    return Work(grid, torch.rand(outs, taps * channels) ** 3, keep * grid.size)


@quick
@given(st.integers(1, 9), st.integers(0, 99))
def test_exchanges_gain(items, seed):
    """The order is a permutation that is worth at least as much, and no single exchange would improve it."""
    worth = torch.rand(items, items, generator=torch.Generator().manual_seed(seed))
    order = exchanged(worth)
    assert sorted(order.tolist()) == list(range(items))
    places = torch.arange(items)
    total = float(worth[order, places].sum())
    assert total >= float(worth.diagonal().sum()) - 1e-5
    for a, b in itertools.combinations(range(items), 2):
        other = order.clone()
        other[[a, b]] = order[[b, a]]
        assert float(worth[other, places].sum()) <= total + 1e-4


@quick
@given(st.sampled_from(FORMATS), st.booleans(), st.sampled_from([1, 4]), st.integers(5, 13), st.integers(0, 50))
def test_never_less_is_kept(form, rows, taps, outs, seed):
    """Whatever the format, the axis and odd sizes: orders are permutations, and at least as much is kept in them."""
    own = work(form, outs=outs, channels=8 if form.m > 1 or taps > 1 else 7, taps=taps, seed=seed)
    before, scores = own.value(), own.scores.clone()
    extent = own.grid.outs if rows else own.grid.channels
    order = best_order([role(own, rows)], extent)
    assert sorted(order.tolist()) == list(range(extent))
    assert own.value() >= before - 1e-5
    shaped = scores.reshape(own.grid.outs, taps, -1)
    expected = shaped[order] if rows else shaped[:, :, order]
    assert torch.equal(own.scores, expected.reshape(scores.shape))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("taps", [1, 3])
def test_worth_is_exact(form, rows, taps):
    """What a deal gains is the difference in the table: with masks chosen anew for N:M, else while the price stays."""
    own = work(form, outs=24, channels=24, taps=taps)
    axis = role(own, rows)
    if axis.block == 1:
        return
    groups = torch.arange(0, 24, axis.block)
    emptied = groups + torch.randint(axis.block, (len(groups),))
    price, masks = own.price() if form.m == 1 else 0.0, own.kept()

    def value():
        sums = own.grid.sums(own.scores)
        if form.m > 1:
            return float(sums[masks].sum()) if rows else own.value()
        return float((sums - price * own.grid.sizes).relu().sum())

    worth, before = axis.worth(emptied), value()
    deal = torch.randperm(len(groups))
    order = torch.arange(24)
    order[emptied] = emptied[deal]
    axis.permute(order)
    gain = float(worth[deal, torch.arange(len(groups))].sum() - worth.diagonal().sum())
    assert value() - before == pytest.approx(gain, abs=1e-4)


def test_parts_of_a_dimension_move_alike():
    """An axis within a product, or a part of a concatenation, moves in all copies as `shrink` would move it."""
    program = convnet()
    axes = infer(program)
    node = next(node for node in axes.dims if node.name == "p_one_weight")
    dim = axes.dims[node][1]  # 16 channels, two groups of 8
    inner = next(atom for atom in atoms(dim) if atom.extent == 8)
    outer = next(atom for atom in atoms(dim) if atom.extent == 2)
    own = work(Format(1, 4), channels=16)
    assert role_of(own, False, dim, inner).spots.tolist() == [list(range(8)), list(range(8, 16))]
    assert role_of(own, False, dim, outer).spots.tolist() == [[n, n + 8] for n in range(8)]
    before, value = own.scores.clone(), own.value()
    order = best_order([role_of(own, False, dim, inner)], 8)
    assert torch.equal(own.scores, before[:, index(dim, {inner: order})])
    assert own.value() >= value


def test_planted_rows_are_found():
    """Rows of equal supports that were mixed up share blocks again: all of the magnitude is kept."""
    torch.manual_seed(0)
    support = torch.rand(6, 32) < 0.3
    rows = (torch.rand(24, 32) + 0.5) * support.repeat_interleave(4, 0)
    mixed = rows[torch.randperm(24)]
    own = Work(Grid(24, 1, 32, Format(4, 1)), mixed, 4.0 * int(support.sum()))
    before = own.value()
    best_order([role(own, True)], 24)
    assert before < 0.8 * float(rows.sum())
    assert own.value() > 0.97 * float(rows.sum())


def test_planted_columns_are_found():
    """Inputs that must not meet in a group of four are dealt apart: 2:4 keeps nearly everything."""
    torch.manual_seed(0)
    strong = torch.zeros(16, 32)
    strong[:, :16] = torch.rand(16, 16) + 1  # all in the first four groups
    own = Work(Grid(16, 1, 32, Format(1, 1, 2, 4)), strong, 0.0)
    before = own.value()
    best_order([role(own, False)], 32)
    assert before < 0.65 * float(strong.sum())
    assert own.value() == pytest.approx(float(strong.sum()), rel=1e-5)


def test_layers_of_one_axis_are_seen_together():
    """A residual axis is the rows of two layers: one order, which never keeps less of both together."""
    one, two = work(Format(4, 1), outs=16, channels=10, seed=1), work(Format(4, 1), outs=16, channels=20, seed=2)
    before = one.value() + two.value()
    best_order([role(one, True), role(two, True)], 16)
    assert one.value() + two.value() > before


def test_what_does_not_matter_is_left_alone():
    """The inputs of 4 x 1 blocks may come in any order: none is proposed."""
    own = work(Format(4, 1))
    assert role(own, False).block == 1
    assert torch.equal(best_order([role(own, False)], 8), torch.arange(8))
