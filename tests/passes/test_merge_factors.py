"""merge-factors: two layers become the one that they are, where that is less work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.passes.factor_low_rank import FactorLowRank
from graphopt.passes.merge_factors import MergeFactors
from tests.programs import assert_same, ops, program_of, tiny


@pytest.fixture(autouse=True)
def _seeded():
    """Layers are made with the same weights in every run."""
    torch.manual_seed(0)


def pair(ins=32, rank=8, outs=32, tokens=4, biases=(True, True)):
    x = torch.randn(tokens, ins, generator=torch.Generator().manual_seed(1))
    front, back = nn.Linear(ins, rank, bias=biases[0]), nn.Linear(rank, outs, bias=biases[1])
    return program_of(lambda s, x: s.b(s.a(x)), x, a=front, b=back)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_two_linear_layers_become_one(biases):
    """A rank that is too high to pay: one layer, the same result, old tensors gone."""
    before = pair(rank=24, biases=biases)
    after = MergeFactors()(before)
    assert ops(after) == ["linear"]
    assert_same(before, after, tolerance=1e-5)
    assert len(after.tensors) == 1 + any(biases)
    assert after.records[-1].flops_after < after.records[-1].flops_before


def test_only_where_it_is_less_work():
    """At ranks below i o / (i + o) the two stay, with the reason; just above they merge."""
    kept = MergeFactors()(pair(rank=15, biases=(False, False)))
    assert ops(kept) == ["linear", "linear"]
    assert "one layer takes 8,192 flops, the two take 7,680" in kept.records[-1].declined[0].reason
    assert ops(MergeFactors()(pair(rank=16, biases=(False, False)))) == ["linear", "linear"]
    assert ops(MergeFactors()(pair(rank=17, biases=(False, False)))) == ["linear"]
    assert ops(MergeFactors(by="bytes")(pair(rank=17))) == ["linear"]
    assert ops(MergeFactors(by="bytes")(pair(rank=8))) == ["linear", "linear"]
    assert ops(MergeFactors(by="always")(pair(rank=1))) == ["linear"]


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 20, 3, stride=2, padding=1), nn.Conv2d(6, 20, 1), nn.Conv1d(6, 20, 5)])
def test_convolutions(layer):
    """A convolution and a 1 x 1 convolution behind it are one."""
    x = torch.randn(2, 6, *[9] * (layer.weight.dim() - 2))
    behind = type(layer)(20, 4, 1)
    before = program_of(lambda s, x: s.b(s.a(x)), x, a=layer, b=behind)
    after = MergeFactors()(before)
    assert len(ops(after)) == 1
    assert_same(before, after, tolerance=1e-5)


def test_the_inverse_of_factoring():
    """Factored and merged again is the dense layer, up to what the rank lost."""
    before = tiny("deit_s")
    factored = FactorLowRank(keep=0.6)(before)
    merged = MergeFactors(by="always")(factored)
    assert ops(merged) == ops(before)
    assert_same(factored, merged, tolerance=1e-4)
    with graphopt.compile(merged) as bundle:
        assert bundle.manifest.verification.passed


def test_left_alone():
    """Something between, or someone else who reads what is between, or a second convolution with a window."""
    x = torch.randn(3, 8)
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    assert len(ops(MergeFactors()(program_of(lambda s, x: s.b(s.a(x).relu()), x, **layers)))) == 3

    def read_twice(s, x):
        y = s.a(x)
        return s.b(y), y

    after = MergeFactors()(program_of(read_twice, x, **layers))
    assert ops(after) == ["linear", "linear"]
    assert "also feeds" in after.records[-1].declined[0].reason
    convs = {"a": nn.Conv2d(3, 3, 3), "b": nn.Conv2d(3, 3, 3)}
    after = MergeFactors()(program_of(lambda s, x: s.b(s.a(x)), torch.randn(1, 3, 9, 9), **convs))
    assert "no 1 x 1" in after.records[-1].declined[0].reason


def test_shared_weights_stay_for_others():
    """A tensor that another layer still reads is not removed."""
    layers = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    before = program_of(lambda s, x: s.b(s.a(x)) + s.a(x.relu()), torch.randn(3, 8), **layers)
    after = MergeFactors()(before)
    assert ops(after).count("linear") == 2
    assert_same(before, after, tolerance=1e-5)
