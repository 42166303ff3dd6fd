"""sparsify-nm: N of each M inputs, and what permuting inputs first is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from graphopt.errors import BadOption
from graphopt.passes.sparsify_nm import SparsifyNm
from graphopt.sparsity import conforms, parse_format
from tests.passes.sparsifying import details, matrices, mlp, weights
from tests.passes.sparsifying import given as layer
from tests.programs import assert_same, program_of


def test_the_picture():
    """The docstring's example: two of each four; the inputs of a program stay where they are."""
    after = SparsifyNm()(layer([4.0, 3.0, 2.0, 5.0, 1.0, 0.0, 1.0, 2.0]))
    assert weights(after)["a.weight"].tolist() == [[4, 0, 0, 5, 1, 0, 0, 2]]


def test_a_hidden_axis_is_permuted():
    """Where the inputs are a hidden axis they are dealt apart, and the layer in front is permuted alike."""
    a, b = nn.Linear(3, 8), nn.Linear(8, 1, bias=False)
    b.weight.data = torch.tensor([[4.0, 3.0, 2.0, 5.0, 0.1, 0.1, 0.1, 0.1]])
    before = program_of(lambda s, x: s.b(s.a(x).relu()), torch.randn(5, 3), a=a, b=b)
    after = SparsifyNm(include=("b",))(before)
    assert sorted(weights(after)["b.weight"][0].tolist()) == [0, 0, 0, 0, 2, 3, 4, 5]
    assert after.records[-1].changed["axis rearranged"] == 1
    b.weight.data[:, 4:] = 0
    assert_same(program_of(lambda s, x: s.b(s.a(x).relu()), torch.randn(5, 3), a=a, b=b), after, tolerance=1e-5)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(["2:4", "1:4", "4:8", "3:5", "4:2:4", "8:1:4"]), st.integers(5, 30), st.integers(3, 20))
def test_any_format_any_size(form, ins, outs):
    """Groups hold exactly N, or as many of them as there are; odd numbers of inputs and outputs are no exception."""
    after = SparsifyNm(format=form)(mlp(ins=ins, hidden=13, outs=outs, tokens=3))
    n, m = parse_format(form).n, parse_format(form).m
    for name, matrix in matrices(after).items():
        assert conforms(matrix, parse_format(form))
        columns = matrix.shape[1]
        each = sum(min(n, m, columns - first) for first in range(0, columns, m))
        assert (np.count_nonzero(matrix, axis=1) == each).all()
        assert details(after)[name.removesuffix(".weight")]["keep"] == pytest.approx(each / columns)


def test_convolutions_count_within_a_tap():
    """The M inputs are consecutive channels of one place of the kernel."""
    conv = nn.Conv2d(8, 4, 3)
    after = SparsifyNm(format="1:4")(program_of(lambda s, x: s.conv(x), torch.randn(1, 8, 5, 5), conv=conv))
    kept = weights(after)["conv.weight"].reshape(4, 2, 4, 9) != 0
    assert (kept.sum(2) == 1).all()


def test_what_it_refuses():
    """Formats that are not N:M, and shares that are not theirs."""
    with pytest.raises(BadOption, match="is not N:M"):
        SparsifyNm(format="4x1", keep=0.5)(mlp())
    with pytest.raises(BadOption, match=r"keeps 0\.5"):
        SparsifyNm(keep=0.25)(mlp())
    assert SparsifyNm(keep=0.5)(mlp()).records[-1].changed["linear"] == 2


def test_all_of_m_is_dense():
    """4:4 changes no bit."""
    before = mlp()
    after = SparsifyNm(format="4:4")(before)
    assert all(torch.equal(tensor, weights(after)[key]) for key, tensor in weights(before).items())
