"""`"optin"`: the trajectory criterion."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes import criteria
from graphopt.passes.criteria import trajectory
from graphopt.passes.criteria.trajectory import Suffix, divergence, everything, features_of
from tests.masking import masked_run
from tests.passes.criteria.nets import (
    attention,
    axes_of,
    axis_of,
    mlp,
    residual,
    samples,
    score,
    seeded,
    settled,
    stored,
    tied,
)
from tests.programs import program_of, tiny


def distance(a, b):
    """|| M_a - M_b ||^2 of rows of length 1, all of them."""
    a, b = (F.normalize(v, dim=-1) for v in (a, b))
    return (a @ a.T - b @ b.T).square().sum()


def forward(axes, x, without=None):
    """The hidden values of the perceptron and its output, without one unit."""
    y = F.relu(F.linear(x, stored(axes, "one.weight"), stored(axes, "one.bias")))
    if without is not None:
        y = y.index_fill(1, torch.tensor([without]), 0)
    return y, F.linear(y, stored(axes, "two.weight"), stored(axes, "two.bias"))


def test_against_the_definition():
    """One unit at a time: Gram matrices of the hidden values, divergence of the outputs, and their balance."""
    axes = mlp()
    data = samples(axes, 2)
    got = score("optin", axes, axis_of(axes, "one.weight"), data)
    expected = []
    for unit in range(8):
        bend, apart = 0.0, 0.0
        for batch in data:
            (x,) = batch.values()
            (y, z), (y1, z1) = forward(axes, x), forward(axes, x, unit)
            bend += distance(y, y1)
            ours, theirs = z.log_softmax(-1), z1.log_softmax(-1)
            apart += 16 * (ours.exp() * (ours - theirs)).sum()
        if apart == 0:
            expected.append(torch.zeros((), dtype=torch.float64))
            continue
        scale = 10.0 ** int(math.log10(bend) - math.log10(apart) - 1)
        expected.append(0.5 * (bend + scale * apart))  # nothing but one feature follows
    torch.testing.assert_close(got, torch.stack(expected))


def test_features_are_what_everything_passes_through():
    """The residual stream behind each addition, not what runs beside it."""
    axes = axes_of(tiny("deit_s"))
    names = [node.name for node in features_of(axes)]
    assert sum("add" in name for name in names) >= 4
    assert not any("softmax" in name or "gelu" in name for name in names)


@pytest.mark.parametrize("net", [residual, attention, tied])
def test_masks_are_those_of_every_shrink(net):
    """Without an item the output is that of the program with the item masked."""
    axes = net()
    (batch,) = samples(axes, 1)
    values = everything(axes.program, batch)
    for atom in axes.free():
        if atom in axes.statistics:
            continue
        suffix = Suffix.of(axes, atom, features_of(axes))
        (output,) = suffix.outputs
        for item in (0, atom.extent - 1):
            mask = torch.ones(atom.extent, dtype=torch.float64)
            mask[item] = 0
            got = dict(suffix._run(values, mask))[output]
            (expected,) = masked_run(axes, {atom: mask.nonzero().flatten()}, batch).values()
            torch.testing.assert_close(got, expected)


def test_items_at_a_time_make_no_difference(monkeypatch):
    """All at once, in pieces, or one by one: the same scores."""
    axes = residual()
    data = samples(axes, 1)
    atom = axis_of(axes, "inner.weight")
    whole = score("optin", axes, atom, data)
    monkeypatch.setattr(trajectory, "_MOST", 2)
    torch.testing.assert_close(score("optin", axes, atom, data), whole)
    monkeypatch.setattr(trajectory, "_MOST", 1)
    torch.testing.assert_close(score("optin", axes, atom, data), whole)


def test_values_in_front_are_not_computed_again():
    """What follows on the last axis is short."""
    axes = residual()
    features = features_of(axes)
    calls = {atom: len(Suffix.of(axes, atom, features).calls) for atom in axes.free()}
    assert calls[axis_of(axes, "inner.weight")] < calls[axis_of(axes, "stem.weight")]


def test_distances_know_neither_rotations_nor_lengths():
    """D does not change under an orthogonal map of the features, nor when rows are scaled by positive numbers."""
    a, b = seeded(7, 4), seeded(7, 4, seed=1)
    rows = torch.arange(7)
    q, _ = torch.linalg.qr(seeded(4, 4, seed=2))
    lengths = seeded(7, 1, seed=3).abs() + 0.1

    def between(x, y):
        return (trajectory._gram(x, 1, rows) - trajectory._gram(y, 1, rows)).square().sum()

    torch.testing.assert_close(between(a @ q, b @ q), between(a, b))
    torch.testing.assert_close(between(a * lengths, b), between(a, b))


def test_a_redundant_pair_ranks_below_what_is_needed():
    """Of large units that cancel each other neither matters as much as a small one that is alone."""
    one, two = settled(nn.Linear(6, 8)), settled(nn.Linear(8, 5), 20)
    one.weight.data[5] = 5 * one.weight.data[5].abs()
    one.bias.data[5] = -200  # never above zero
    two.weight.data[:, 5] *= 5
    axes = axes_of(program_of(lambda s, x: s.two(F.relu(s.one(x))), seeded(3, 6), one=one, two=two))
    atom = axis_of(axes, "one.weight")
    assert int(score("optin", axes, atom, samples(axes)).argmin()) == 5
    assert int(score("l1", axes, atom).argmax()) == 5


def test_samples_and_rows_bound_the_work():
    """No more samples than asked for are run."""
    axes = mlp()
    data = samples(axes, 4)
    atom = axis_of(axes, "one.weight")
    few = score("optin", axes, atom, data, samples=3)
    torch.testing.assert_close(few, score("optin", axes, atom, data[:1] and samples(axes, 1), samples=3))
    assert not torch.equal(few, score("optin", axes, atom, data))
    assert bool(score("optin", axes, atom, data, rows=2).isfinite().all())


def test_heads_count_half():
    """The share of heads against neurons."""
    axes = attention()
    data = samples(axes, 1)
    (head,) = axes.free("head")
    torch.testing.assert_close(
        2 * score("optin", axes, head, data), score("optin", axes, head, data, head_share=1.0), rtol=1e-6, atol=1e-12
    )


def test_outputs_of_one_number():
    """A softmax of one number says nothing; the relative change does."""
    a, b = torch.tensor([[2.0], [1.0]]), torch.tensor([[2.0], [2.0]])
    assert divergence(a, b).item() == pytest.approx(0.2)
    assert divergence(a, a).item() == 0
    assert criteria.load("optin").needs_calibration
