"""eliminate-common-subexpressions: what is the same, and what only looks it."""

from __future__ import annotations

import torch
from torch import nn

from graphopt.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tests.programs import assert_same, ops, program_of, tiny

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
CSE = EliminateCommonSubexpressions()


def test_chains_merge_from_the_front():
    """Two equal chains become one."""
    before = program_of(lambda s, x: x.exp().sin() + x.exp().sin() * 2, X)
    after = CSE(before)
    assert ops(after) == ["exp", "sin", "mul", "add"]
    assert after.records[-1].changed == {"calls": 2}
    assert_same(before, after)


def test_arguments_that_differ_in_type_or_sign_stay_apart():
    """1 and 1.0 and True, and 0.0 and -0.0, are equal in Python and not in a graph."""
    ids = torch.ones(2, dtype=torch.int64)

    def forward(s, i):
        zeros = (torch.full_like(i, 0.0, dtype=torch.float32), torch.full_like(i, -0.0, dtype=torch.float32))
        return i * 1, i * 1.0, i * True, zeros[0], zeros[1]

    before = program_of(forward, ids)
    after = CSE(before)
    assert after.records[-1].total == 0
    assert_same(before, after)


def test_random_calls_stay_apart():
    """Two draws are two draws."""
    after = CSE(program_of(lambda s, x: x + torch.rand(3) - torch.rand(3), X))
    assert ops(after).count("rand") == 2


def test_tied_weights_are_one_input():
    """GPT-2's head and embedding share one placeholder afterwards; nothing is computed otherwise."""
    after = CSE(tiny("gpt2"))
    assert after.records[-1].changed == {"tensors": 1}
    assert_same(tiny("gpt2"), after)


def test_equal_weights_that_are_not_tied_stay_two():
    """Equal today is not the same: only shared memory counts."""
    one, two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    two.load_state_dict(one.state_dict())
    after = CSE(program_of(lambda s, x: s.one(x) - s.two(x), X, one=one, two=two))
    assert ops(after) == ["linear", "linear", "sub"]


def test_same_value_as_two_outputs():
    """Both outputs stay, and are the same value."""
    before = program_of(lambda s, x: (x.exp(), x.exp()), X)
    after = CSE(before)
    assert ops(after) == ["exp"]
    assert_same(before, after)
