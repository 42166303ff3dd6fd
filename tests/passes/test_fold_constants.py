"""fold-constants: what is computed ahead, and what would cost more than it saves."""

from __future__ import annotations

import torch
from torch import nn

from graphopt.capture import capture
from graphopt.passes.fold_constants import FoldConstants
from tests.programs import assert_same, ops, program_of, tiny

X = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1))


def test_largest_constant_subgraph_becomes_one_tensor():
    """A rotary table, from arange to cos, is one constant."""

    def forward(s, x):
        angle = torch.outer(torch.arange(6.0), 100.0 ** (-torch.arange(0, 8) / 8))
        return x * angle.cos()

    before = program_of(forward, X)
    after = FoldConstants()(before)
    assert ops(after) == ["mul"]
    assert after.records[-1].changed == {"aten.cos": 1}
    assert_same(before, after)


def test_several_readers_share_one_constant():
    """A constant that is read twice, or computed twice with the same value, is kept once."""
    before = program_of(lambda s, x: (x + torch.arange(8.0)) * (torch.arange(0, 16, 2) / 2.0) + torch.arange(8.0), X)
    after = FoldConstants()(before)
    assert ops(after) == ["add", "mul", "add"]
    assert len(after.tensors) == 1
    assert_same(before, after)


def test_parts_of_a_split_fold_one_by_one():
    """A constant that is split leaves its parts, and no split."""
    before = program_of(lambda s, x: torch.cat([p * x[..., :4] for p in s.w.weight.split(4, -1)]), X, w=nn.Linear(8, 6))
    after = FoldConstants()(before)
    assert "split" not in ops(after)
    assert_same(before, after)


def test_growth_has_a_limit():
    """A mask broadcast to 4 MiB stays a computation, which is said; the small mask in it is folded."""

    def forward(s, x):
        mask = torch.ones(1024, 1).triu().expand(1024, 1024).contiguous()
        return x.sum() + mask

    before = program_of(forward, X)
    after = FoldConstants()(before)
    assert after.parameters_bytes < 64 * 1024
    assert "would add" in after.records[-1].declined[0].reason
    assert_same(before, after)
    assert FoldConstants(growth_bytes=8 << 20)(before).parameters_bytes == 4 << 20


def test_weights_that_are_only_turned_round_are_replaced():
    """A transposed weight takes the place of the original: no growth, whatever its size."""
    before = program_of(lambda s, x: x @ s.w.weight.t(), X, w=nn.Linear(8, 512))
    after = FoldConstants(growth_bytes=0)(before)
    assert ops(after) == ["matmul"]
    assert_same(before, after, tolerance=1e-5)  # another kernel for another memory order


def test_what_is_not_constant_stays():
    """Random numbers, inputs and buffers that the program updates are not folded."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.ones(8))

        def forward(self, x):
            self.calls += 1
            return x * self.calls.sin() + torch.rand(8).cos()

    after = FoldConstants()(capture(Net(), X))
    assert {"sin", "rand", "cos"} <= set(ops(after))


def test_constant_outputs_stay_values():
    """An output that does not depend on the inputs is left as it is, with the reason."""
    before = program_of(lambda s, x: (x + 1, torch.arange(4)), X)
    after = FoldConstants()(before)
    assert after.records[-1].declined[0].reason == "it is an output of the program"
    assert_same(before, after)


def test_folded_programs_round_trip(tmp_path):
    """New constants are written and read like any other tensor."""
    after = FoldConstants()(tiny("llama"))
    after.save(tmp_path / "m.pt2")
    loaded = capture(tmp_path / "m.pt2")
    assert str(loaded) == str(after)
    assert_same(after, loaded)
