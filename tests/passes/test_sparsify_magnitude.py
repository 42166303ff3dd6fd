"""sparsify-magnitude: Global MP, its minimum, and what each allocation keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.passes.sparsify_magnitude import SparsifyMagnitude
from tests.passes.sparsifying import convnet, details, given, matrices, mlp, nonzeros, weights
from tests.programs import program_of


def test_the_picture():
    """The docstring's example: the three largest of six weights stay, wherever they are."""
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    a.weight.data, b.weight.data = torch.tensor([[9.0, -5.0], [1.0, 4.0]]), torch.tensor([[3.0, 2.0]])
    before = program_of(lambda s, x: s.b(s.a(x)), torch.randn(3, 2), a=a, b=b)
    found = weights(SparsifyMagnitude(keep=0.5)(before))
    assert found["a.weight"].tolist() == [[9, -5], [0, 4]]
    assert found["b.weight"].tolist() == [[0, 0]]


@pytest.mark.parametrize("keep", [0.05, 0.33, 0.9])
def test_is_the_global_sort(keep):
    """Without a minimum, what stays is what is above the k-th largest magnitude of all weights together."""
    before = convnet()
    after = SparsifyMagnitude(keep=keep, minimum=0.0, include=("*",))(before)
    old, new = matrices(before), matrices(after)
    everything = np.sort(np.concatenate([np.abs(matrix).ravel() for matrix in old.values()]))
    removed = int((1 - keep) * len(everything) + 1e-6)
    threshold = everything[removed]
    for name, matrix in old.items():
        assert np.array_equal(new[name], np.where(np.abs(matrix) >= threshold, matrix, 0))
    assert sum(nonzeros(after).values()) == len(everything) - removed


def test_the_minimum_saves_small_layers():
    """A layer of tiny weights would be emptied; with a minimum it keeps that much, and the others pay for it."""
    before = mlp()
    with torch.no_grad():
        small = {name: tensor * (1e-3 if name.startswith("b") else 1) for name, tensor in weights(before).items()}
    before = program_of(
        lambda s, x: s.b(s.a(x)), torch.randn(3, 24), a=_linear(small["a.weight"]), b=_linear(small["b.weight"])
    )
    total = 24 * 48 + 48 * 20
    empty = nonzeros(SparsifyMagnitude(keep=0.3, minimum=0.0)(before))
    saved = nonzeros(SparsifyMagnitude(keep=0.3, minimum=0.05)(before))
    assert empty["b.weight"] == 0
    assert saved["b.weight"] == int(0.05 * total)
    assert sum(saved.values()) == sum(empty.values()) == int(np.ceil(0.3 * total))


def _linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def test_a_batch_norm_hides_the_scale():
    """A convolution ten times as large in front of a batch norm computes the same and keeps more: not invariant."""

    def scaled(factor):
        torch.manual_seed(0)
        one, norm, two = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, eps=0.0).eval(), nn.Conv2d(8, 8, 3)
        one.weight.data *= factor
        norm.running_var *= factor**2
        return program_of(lambda s, x: s.two(s.norm(s.one(x))), torch.randn(1, 8, 9, 9), one=one, norm=norm, two=two)

    plain, large = scaled(1.0), scaled(10.0)
    (x,) = plain.example_inputs.values()
    torch.testing.assert_close(plain(x), large(x))
    assert nonzeros(SparsifyMagnitude(keep=0.5)(plain))["one.weight"] < 330
    assert nonzeros(SparsifyMagnitude(keep=0.5)(large))["one.weight"] > 500


def test_uniform_and_erk():
    """Uniform keeps the share of each layer; ERK keeps more of thin layers, and all of the thinnest."""
    uniform = details(SparsifyMagnitude(keep=0.2, allocation="uniform")(convnet()))
    erk = details(SparsifyMagnitude(keep=0.2, allocation="erk")(convnet()))
    assert all(row["keep"] == pytest.approx(0.2, abs=0.01) for row in uniform.values())
    assert erk["head"]["keep"] == 1.0
    assert erk["head"]["format"] == "dense"
    assert erk["one"]["keep"] < 0.2


def test_equal_weights_are_no_trouble():
    """Of equal weights the first stay, and exactly as many as asked."""
    after = SparsifyMagnitude(keep=0.5)(given([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]))
    assert weights(after)["a.weight"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
