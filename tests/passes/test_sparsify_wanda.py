"""sparsify-wanda: weights times the norms of what they meet, within each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.passes.sparsify_magnitude import SparsifyMagnitude
from graphopt.passes.sparsify_wanda import SparsifyWanda
from tests.passes.sparsifying import matrices, weights
from tests.programs import program_of


def layer_on(x, outs=12, bias=False, seed=0):
    """One linear layer and the data that it reads, as program and calibration."""
    torch.manual_seed(seed)
    before = program_of(lambda s, x: s.a(x), x, a=nn.Linear(x.shape[1], outs, bias=bias))
    return before, [{before.inputs[0].name: x}]


def test_the_picture():
    """The docstring's example: norms 9, 1, 1, 1 let the first weight stay before two larger ones."""
    x = torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0]))
    before, data = layer_on(x, outs=1)
    a = nn.Linear(4, 1, bias=False)
    a.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    before = program_of(lambda s, x: s.a(x), x, a=a)
    after = SparsifyWanda(keep=0.5, compensate=False, calibration=data)(before)
    assert weights(after)["a.weight"].tolist() == [[1, 0, 0, 4]]


@pytest.mark.parametrize("options", [{"keep": 0.3}, {"format": "2:4"}, {"format": "2x1", "keep": 0.5}])
def test_equal_norms_are_magnitude(options):
    """Where all inputs have one norm, each row keeps its largest weights."""
    before, data = layer_on(torch.eye(16) * 3)
    after = matrices(SparsifyWanda(compensate=False, calibration=data, **options)(before))["a.weight"]
    if options.get("format") == "2:4":
        assert np.array_equal(after, matrices(SparsifyMagnitude(**options)(before))["a.weight"])
        return
    dense, rows = matrices(before)["a.weight"], 2 if "format" in options else 1
    sums = np.abs(dense).reshape(-1, rows, 16).sum(1)
    count = int(np.ceil(options["keep"] * 16))
    least = np.sort(sums)[:, -count][:, None]
    assert np.array_equal(after != 0, np.repeat(sums >= least, rows, 0))


def test_scales_of_inputs_do_not_count():
    """x_j -> c x_j with W_:j -> W_:j / c is the same function, and keeps the same weights."""
    torch.manual_seed(0)
    x, scale = torch.randn(60, 16), torch.rand(16) * 10 + 0.1
    before, data = layer_on(x)
    a = nn.Linear(16, 12, bias=False)
    a.weight.data = weights(before)["a.weight"] / scale
    other = program_of(lambda s, x: s.a(x), x * scale, a=a)
    one = matrices(SparsifyWanda(keep=0.4, compensate=False, calibration=data)(before))["a.weight"]
    two = matrices(SparsifyWanda(keep=0.4, compensate=False, calibration=[{other.inputs[0].name: x * scale}])(other))[
        "a.weight"
    ]
    assert np.array_equal(one != 0, two != 0)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.77])
def test_all_rows_alike(keep):
    """Every row keeps in - int(in (1 - keep)) weights."""
    before, data = layer_on(torch.randn(40, 30))
    after = matrices(SparsifyWanda(keep=keep, compensate=False, calibration=data)(before))["a.weight"]
    assert (np.count_nonzero(after, axis=1) == 30 - int(30 * (1 - keep) + 1e-6)).all()


def test_outliers_protect_their_weights():
    """An input a thousand times as large as the others keeps all its weights."""
    x = torch.randn(40, 16)
    x[:, 5] *= 1000
    before, data = layer_on(x)
    assert (matrices(SparsifyWanda(keep=0.25, compensate=False, calibration=data)(before))["a.weight"][:, 5] != 0).all()
    assert not (matrices(SparsifyMagnitude(keep=0.25)(before))["a.weight"][:, 5] != 0).all()


def test_less_is_lost_than_by_magnitude():
    """With log-normal norms of inputs the outputs change less than by magnitude, on the mean of ten layers."""
    lost = {"wanda": 0.0, "magnitude": 0.0}
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(100, 32, generator=generator) * torch.randn(32, generator=generator).exp()
        before, data = layer_on(x, seed=seed)
        wanted = before(x)
        for name, kind in (("wanda", SparsifyWanda), ("magnitude", SparsifyMagnitude)):
            after = kind(keep=0.5, allocation="uniform", compensate=False, calibration=data)(before)
            lost[name] += float((after(x) - wanted).square().sum() / wanted.square().sum())
    assert lost["wanda"] < 0.8 * lost["magnitude"]


def test_inputs_are_those_of_the_sparse_network():
    """The second layer is judged on what the sparse first one gives: a neuron that died protects nothing."""
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    a.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.1, 0.1, 1, 0], [0, 0, 0, 0.1]])
    b.weight.data = torch.tensor([[1.0, 2, 3, 900], [1, 2, 3, 900]])
    x = torch.eye(4)
    x[3, 3] = 1000.0
    before = program_of(lambda s, x: s.b(s.a(x)), x, a=a, b=b)
    data = [{before.inputs[0].name: x}]
    # One of four weights a row stays, so that row 2 of a loses its small ones, and row 3 keeps its only one.
    after = weights(SparsifyWanda(keep=0.25, compensate=False, calibration=data)(before))
    assert after["a.weight"].tolist() == (a.weight.data * (a.weight.data.abs() > 0.05) * (x > 0)).tolist()
    assert after["b.weight"].tolist() == [[0, 0, 0, 900], [0, 0, 0, 900]]


def test_inputs_that_are_always_zero():
    """Norms of zero (an expert that saw nothing) leave the shares as they are."""
    before, data = layer_on(torch.zeros(8, 16))
    after = matrices(SparsifyWanda(keep=0.5, compensate=False, calibration=data)(before))["a.weight"]
    assert np.count_nonzero(after) == 12 * 8
