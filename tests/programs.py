"""Programs and checks that many tests share. Programs are immutable, so each is captured once per session."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.exported import op_name
from graphopt.program import Program
from tests.hard_nets import HARD
from tests.models import TINY


@cache
def tiny(name: str) -> Program:
    """A model of the zoo at test size, captured."""
    return capture(*TINY[name](), name=name)


@cache
def hard(name: str) -> Program:
    """A model that breaks other tools, captured."""
    return capture(*HARD[name](), name=name)


def program_of(function, *examples: Tensor, **modules: nn.Module) -> Program:
    """Capture `function(self, *tensors)`, with `modules` as attributes of self; weights from a fixed seed."""

    class Net(nn.Module):
        def forward(self, *tensors: Tensor):
            return function(self, *tensors)

    net = Net()
    for name, module in modules.items():
        setattr(net, name, module)
    return capture(net, examples)


def ops(program: Program) -> list[str]:
    """The operators in order, without `aten.` and overload: ["conv2d", "relu"]."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return [op_name(node).removeprefix("aten.").partition(".")[0] for node in calls]


def assert_same(before: Program, after: Program, *, tolerance: float = 0.0) -> None:
    """Both give the same on the example inputs and on fresh ones like these; NaN equals NaN."""
    assert [str(spec) for spec in before.inputs] == [str(spec) for spec in after.inputs]
    assert [str(spec) for spec in before.outputs] == [str(spec) for spec in after.outputs]
    examples = before.example_inputs
    assert examples is not None
    generator = torch.Generator().manual_seed(7)
    fresh = {
        name: torch.randn(value.shape, generator=generator).to(value.dtype) if value.is_floating_point() else value
        for name, value in examples.items()
    }
    for inputs in (examples, fresh):
        wanted, got = before.run(inputs), after.run(inputs)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=tolerance, atol=tolerance, equal_nan=True)
