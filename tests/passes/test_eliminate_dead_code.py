"""eliminate-dead-code: calls and tensors that no output needs."""

from __future__ import annotations

import torch
from torch import nn

from graphopt.capture import capture
from graphopt.edit import Edit
from graphopt.passes.eliminate_dead_code import EliminateDeadCode
from tests.programs import assert_same, ops, program_of

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


def test_dead_calls_and_their_weights_go():
    """A head whose result nobody reads goes, weights and all."""

    def forward(s, x):
        s.head(x.cos())
        return x.relu()

    after = EliminateDeadCode()(program_of(forward, X, head=nn.Linear(3, 4)))
    assert ops(after) == ["relu"]
    assert after.tensors == {}
    assert after.exported.state_dict == {}
    assert after.records[-1].changed["tensors"] == 2


def test_inputs_stay():
    """An input that nobody reads is still part of the interface."""
    before = program_of(lambda s, x, y: x + 1, X, X)
    after = EliminateDeadCode()(before)
    assert len(after.inputs) == 2
    assert_same(before, after)


def test_updates_of_buffers_stay():
    """The update of a buffer is an effect: it and what it needs stay."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x):
            self.seen += x.sum(0)
            return x * 2

    after = EliminateDeadCode()(capture(Net(), X))
    assert "sum" in ops(after)
    assert "seen" in after.exported.state_dict


def test_random_calls_stay():
    """Without the first draw the second would draw other numbers; the reason is recorded."""
    program = program_of(lambda s, x: x + torch.rand(3), X)
    edit = Edit(program)
    draw = next(node for node in edit.graph.nodes if "rand" in node.name)
    edit.call(draw.target, draw.args, draw.kwargs, like=draw)
    after = EliminateDeadCode()(program.replace(exported=edit.finish()))
    assert ops(after) == ["rand", "rand", "add"]
    assert "random" in after.records[-1].declined[0].reason
