"""Loops over tokens that a capture unrolled: what is one, what is not, and that the first steps are a shorter one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.edit import Edit
from graphopt.loops import loops_in
from graphopt.passes import PREPARE
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.programs import program_of

N = 5


def steps(x: Tensor, step: Callable[[Tensor | int, Tensor, int], Tensor], start: Any = 0) -> list[Tensor]:
    """h = step(h, x_t, t), token by token."""
    found, h = [], start
    for t in range(x.shape[1]):
        h = step(h, x[:, t], t)
        found.append(h)
    return found


def captured(function: Callable[[Any, Tensor], Any]) -> Program:
    return run_passes(program_of(function, torch.randn(2, N, 3)), PREPARE)


LOOPS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a state": lambda self, x: torch.stack(steps(x, lambda h, a, t: a.exp() * h + a, torch.zeros(2, 3)), 1),
    "no state": lambda self, x: torch.stack([x[:, t] * 2 for t in range(N)], 1),
    "from the end": lambda self, x: torch.stack([x[:, t - N].sin() for t in range(N)], 1),
    "a new dimension last": lambda self, x: torch.stack(steps(x, lambda h, a, t: a * h, torch.ones(2, 3)), -1),
}
OTHERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "steps count": lambda self, x: torch.stack(steps(x, lambda h, a, t: a * h + t, torch.ones(2, 3)), 1),
    "the last state is read": lambda self, x: (found := steps(x.sin(), lambda h, a, t: a.exp() + h)) and (
        torch.stack(found, 1), found[-1].cos()),
    "one step skips": lambda self, x: torch.stack([x[:, t] * 2 if t != 3 else x[:, t] for t in range(N)], 1),
    "two tokens at once": lambda self, x: torch.stack([x[:, t] + x[:, t - 1] for t in range(N)], 1),
    "backwards": lambda self, x: torch.stack([x[:, N - 1 - t] * 2 for t in range(N)], 1),
    "another value in one step": lambda self, x: torch.stack([(x if t else x.sin())[:, t] for t in range(N)], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_equal_steps_are_a_loop_and_the_first_of_them_a_shorter_one(name: str) -> None:
    """Shortened to three steps it gives what the same loop gives of three tokens."""
    program = captured(LOOPS[name])
    edit = Edit(program)
    (loop,) = loops_in(edit.graph.nodes)
    assert set(loop.steps.values()) == set(range(N))
    assert sorted(loop.steps[take] for take in loop.takes) == sorted([*range(N)] * len(loop.sources))
    x = torch.randn(2, N, 3)
    loop.shorten(3)
    edit.infer(loop.joined)
    got = program.replace(exported=edit.finish()).run({program.inputs[0].name: x})["output"]
    wanted = program.run({program.inputs[0].name: x})["output"].narrow(loop.dim, 0, 3)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", OTHERS)
def test_steps_that_are_not_alike_are_none(name: str) -> None:
    """Each of these knows where it is, or is read elsewhere: with fewer tokens it would be another."""
    assert not loops_in(captured(OTHERS[name]).graph.nodes)
