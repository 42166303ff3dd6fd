"""Verification: what agrees passes, what does not is named with its place and both values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import ChoiceMayDiffer, Exit, VerificationFailed
from graphopt.token_trace import MARK
from graphopt.verify import TOLERANCES, compare, round_up, samples_of, tolerance_of, verify

F32 = TOLERANCES["float32"]


class Two(nn.Module):
    """Two outputs: a float one and an integer one."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x * 2, "best": x.argmax(1)}


@pytest.fixture
def program() -> graphopt.Program:
    """A captured Two with example inputs."""
    return graphopt.capture(Two(), (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),))


def right(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What an artefact of Two shall give."""
    return [arrays[0] * 2, arrays[0].argmax(1)]


def test_agreement_is_recorded(program: graphopt.Program) -> None:
    """Runners, inputs, errors and tolerance stand in the result."""

    def nearly(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [arrays[0] * np.float32(2.000001), arrays[0].argmax(1)]

    found = verify(program, "two", {"native": right, "other": nearly}, samples_of(program))
    assert found.passed
    assert found.runners == ("native", "other")
    assert found.inputs == "1 set of example inputs"
    assert 0 < found.max_abs_error < 1e-5
    assert 0 < found.max_rel_error < 1e-6
    assert (found.rtol, found.atol) == (F32.rtol, F32.atol)


def test_a_wrong_element_is_named(program: graphopt.Program) -> None:
    """Output, index, both values, runner and inputs; exit code 1."""

    def wrong(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        y = arrays[0] * 2
        y[1, 2] = 77
        return [y, arrays[0].argmax(1)]

    with pytest.raises(VerificationFailed, match=r"two: output y\[1, 2\] is 77\.0 in the artefact and") as caught:
        verify(program, "two", {"native": wrong}, samples_of(program))
    assert caught.value.exit == Exit.CHECK_FAILED
    assert "1 of 12 elements differ" in str(caught.value)
    assert "run by native on the example inputs" in str(caught.value)


def test_a_choice_within_rounding_may_be_all(program: graphopt.Program) -> None:
    """Where the program chooses tokens, the way out is to tell a fault from a tie."""
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    node.meta["custom"] = {MARK: [[0, "index", 4, None]]}
    with pytest.raises(ChoiceMayDiffer, match="12 of 12 elements differ") as caught:
        verify(program, "two", {"native": lambda arrays: [arrays[0] * 3, arrays[0].argmax(1)]}, samples_of(program))
    assert "of two within rounding" in caught.value.way_out
    assert caught.value.code == VerificationFailed.code


def test_integers_must_be_equal(program: graphopt.Program) -> None:
    """An index that is off by one is no rounding error."""
    off = [np.zeros((3, 4), np.float32), np.zeros(3, np.int64)]

    def wrong(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [right(arrays)[0], right(arrays)[1] + 1]

    with pytest.raises(VerificationFailed, match=r"output best\[0\].*tolerance exact"):
        verify(program, "two", {"native": wrong}, samples_of(program))
    assert compare(off[1], off[1], F32) is None


@pytest.mark.parametrize(
    ("got", "want", "agree"),
    [
        ([1.0, np.nan], [1.0, np.nan], True),
        ([np.inf, -np.inf], [np.inf, -np.inf], True),
        ([1.0, np.nan], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, np.nan], False),
        ([np.inf], [-np.inf], False),
        ([np.inf], [3e38], False),
        ([1.00005, 0.0], [1.0, 0.00009], True),  # small ones may be off by a share of the largest
        ([1.0005], [1.0], False),
        ([0.0], [0.0], True),
        ([1e-12], [0.0], True),  # rounding of what cancelled
        ([1e-3], [0.0], False),
        ([], [], True),
    ],
)
def test_floats(got: list[float], want: list[float], agree: bool) -> None:
    """Non-finite values are compared as such, finite ones within the tolerance."""
    fault = compare(np.array(got, np.float32), np.array(want, np.float32), F32)
    assert (fault is None) == agree


def test_shapes_and_dtypes_count() -> None:
    """Equal values in another shape or dtype are a fault, not a broadcast."""
    zeros = np.zeros((2, 2), np.float32)
    assert compare(zeros[:1], zeros, F32) is not None
    assert compare(zeros.astype(np.float64), zeros, F32) is not None


def test_bfloat16_is_compared(program: graphopt.Program) -> None:
    """The dtype that numpy lacks goes through, with its own tolerance."""
    half = graphopt.capture(nn.Linear(8, 8).to(torch.bfloat16).eval(), (torch.randn(2, 8).to(torch.bfloat16),))
    assert tolerance_of(half) == TOLERANCES["bfloat16"]
    assert tolerance_of(program) == F32

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        x = torch.from_numpy(arrays[0].astype(np.float32)).to(torch.bfloat16)
        return [half(x).float().numpy().astype(arrays[0].dtype)]  # type: ignore[union-attr]

    assert verify(half, "half", {"native": run}, samples_of(half)).passed


def test_samples() -> None:
    """Calibration first; constant example inputs get seeded random company; integers stay the example's."""

    def origins(*arguments: Any) -> list[str]:
        return [sample.origin for sample in samples_of(*arguments)]

    constant = graphopt.capture(Two(), (torch.zeros(3, 4),))
    assert origins(constant) == ["example inputs", "random inputs"]
    assert origins(constant, [{"x": np.ones((3, 4), np.float32)}] * 9) == ["calibration inputs"] * 4
    words = graphopt.capture(nn.Embedding(50, 4), (torch.full((1, 3), 49),))
    assert origins(words) == ["example inputs"]


def test_errors_are_rounded_up() -> None:
    """Two digits, never less than what was found."""
    assert round_up(0.0) == 0.0
    assert round_up(1.21e-7) == pytest.approx(1.3e-7)
    assert round_up(9.99) == pytest.approx(10.0)
    assert round_up(0.12) == pytest.approx(0.12)
