"""Inference: what it shows, explains and leaves alone, and that its time grows with the program only."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from graphopt.axes import Axes, infer
from graphopt.capture import capture
from graphopt.edit import Edit
from graphopt.program import Program
from graphopt.shrink import shrink
from tests.graphopt.axes.single import assert_equal, aten
from tests.masking import masked_run
from tests.programs import program_of

X = torch.randn(2, 6)


def test_the_picture() -> None:
    """Products from reshapes, sums from concatenations, marks on what is pinned."""

    def net(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(torch.cat([y.view(2, 4, 2).transpose(1, 2).reshape(2, 8), x], 1))

    axes = infer(program_of(net, X, first=nn.Linear(6, 8), second=nn.Linear(14, 3)))
    shown = {name: text for name, _, text in axes.rows()}
    assert shown["linear"] == "[!a0=2, (n0=4 n1=2)]"
    assert shown["transpose"] == "[!a0=2, n1=2, n0=4]"
    assert shown["cat"] == "[!a0=2, ((n1=2 n0=4) + !n2=6)]"
    assert shown["p_second_weight"] == "[!n3=3, ((n1=2 n0=4) + !n2=6)]"
    assert axes.explain(axes["n0"]) == [
        "n0: neuron of 4, free",
        "  first.weight[0]",
        "  first.bias[0]",
        "  second.weight[1], summed over",
    ]
    assert axes.explain(axes["n3"])[0] == "n3: neuron of 3, pinned: program output"


def test_unknown_operators_pin_and_are_listed() -> None:
    """No guess: what they touch must not shrink, and the reason names them."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 3)

    def net(self, x: Tensor) -> Tensor:
        return self.second(torch.linalg.inv(self.first(torch.cat([x, x, x])))[:2])

    axes = infer(program_of(net, X, first=first, second=second))
    assert not axes.free()
    assert any("no rule for this operator" in decline.reason for decline in axes.unknown)
    assert "has no rule" in str(axes.explain(axes["n0"]))


def test_one_name_for_two_tensors_is_one_axis() -> None:
    """Tied weights have the same axes, in whatever place they are used."""
    first, second, third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
    second.weight = first.weight
    axes = infer(program_of(lambda net, x: net.third(net.second(torch.relu(net.first(x)))), X, first=first,
                            second=second, third=third))  # fmt: skip
    assert not axes.free()  # what comes in is an input, so what goes out is pinned, too


def test_mutated_buffers_keep_their_axes() -> None:
    """A state that a program updates shrinks with what is written to it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("state", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            self.state.copy_(self.state * 0.5 + self.first(x).sum(0))
            return self.second(self.first(x) + self.state)

    axes = infer(capture(Net().eval(), (X,)))
    (neuron,) = axes.free()
    after = shrink(axes, {neuron: [0, 5, 2]})
    assert {tuple(value.shape) for value in after.tensors.values()} == {(3, 6), (3,), (3, 3)}


def test_parameters_that_a_program_updates_are_no_outputs() -> None:
    """As RWKV's, which scales its weights in place: their axes are pinned by nothing."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.second.weight.div_(2.0)
            return self.second(torch.relu(self.first(x)))

    axes = infer(capture(Net().eval(), (X,)))
    (neuron,) = axes.free()
    assert axes.where(neuron) == "first.weight[0]"
    keep = {neuron: [0, 5, 2]}
    examples = axes.program.example_inputs
    assert_equal(shrink(axes, keep).run(examples), masked_run(axes, keep, examples), 1e-5, keep)


def _chain(length: int, kind: str) -> Program:
    """`length` steps on a tensor, without capturing, which takes longer than what is measured."""
    edit = Edit(program_of(lambda net, x: net.second(net.first(x)), X, first=nn.Linear(6, 4), second=nn.Linear(4, 3)))
    last = next(node for node in edit.graph.nodes if node.name == "linear_1")
    source = last.args[0]
    value = source
    for step in range(length):
        if kind == "residual":
            value = edit.call(aten.add.Tensor, (value, edit.call(aten.relu.default, (value,), like=last)), like=last)
        elif kind == "views":
            value = edit.call(aten.reshape.default, (value, [2, 2, 2] if step % 2 == 0 else [2, 4]), like=last)
        else:
            value = edit.call(aten.cat.default, ([value, source], 1), like=last)
    if kind == "views" and length % 2:
        value = edit.call(aten.reshape.default, (value, [2, 4]), like=last)
    if kind == "cat":
        value = edit.call(aten.slice.Tensor, (value, 1, 0, 4), like=last)
    last.args = (value, *last.args[1:])
    return Program(edit.finish(), name="chain")


@pytest.mark.parametrize("kind", ["residual", "views"])
def test_time_grows_with_the_program_only(kind: str) -> None:
    """Four times as many nodes take less than ten times as long."""

    def seconds(length: int) -> float:
        program = _chain(length, kind)
        started = time.process_time()
        axes = infer(program)
        assert len(axes.free()) == (1 if kind == "residual" else 2)
        return time.process_time() - started

    seconds(50)
    short, long = seconds(500), seconds(2000)
    assert long < 10 * max(short, 0.02), f"{short:.3f} s and {long:.3f} s"


def test_a_thousand_concatenations() -> None:
    """Deep sums are no deep recursion; inference, listing and shrinking go through."""
    axes: Axes = infer(_chain(1000, "cat"))
    (neuron,) = axes.free()
    assert len(axes.listing()[-1]) < 100_000
    after = shrink(axes, {neuron: [0, 2]})
    cats = [node for node in after.graph.nodes if "cat" in node.name]
    assert cats[-1].meta["val"].shape == (2, 2 * 1001)
