"""What follows an anchor, where the column index is one dimension or two: which operands are read, and how."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from graphopt.codegen.kernels.epilogue import Absorbed, absorb
from tests.codegen.kernels.harness import relax_main

op = relax.op


def absorbed(shape: tuple[int, ...], inner: int, tail, *operands: relax.Expr) -> tuple[Absorbed, relax.Var]:
    """What is absorbed of `tail(emit, y, *operands)` behind an anchor of a shape; and the program's result."""
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    params = [x, *(o for o in operands if isinstance(o, relax.Var))]
    flow = relax_main(lambda b: tail(b.emit, b.emit(op.abs(x)), *operands), params)
    return absorb(flow, flow.bindings[0].var, inner), flow.function.body.body


def add(emit, y, other):
    return emit(op.add(y, other))


def variable(*shape: int) -> relax.Var:
    return relax.Var("r", relax.TensorType(shape, "float32"))


@st.composite
def broadcasts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """A shape, that of an operand that broadcasts to it, and how many last dimensions are the column index."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=4)))
    other = tuple(draw(st.sampled_from([1, s])) for s in shape)[draw(st.integers(0, len(shape))) :]
    return shape, other, draw(st.integers(1, 2))


@settings(max_examples=150, deadline=None)
@given(broadcasts(), st.booleans())
def test_operands_are_broadcast(case, constant):
    """Each operand that is absorbed is read as broadcasting has it; all are but those that split the columns."""
    shape, other, inner = case
    array = np.random.default_rng(0).normal(size=other).astype(np.float32)
    operand = relax.const(array) if constant else variable(*other)
    after, result = absorbed(shape, inner, add, operand)
    wide = (1,) * (len(shape) - len(other)) + other
    columns = math.prod(shape[-inner:])
    if math.prod(wide[-inner:]) not in (1, columns):
        assert not after.epilogue.steps
        return
    if not other and not constant:
        return  # scalars that are known only at run time may or may not be taken
    assert after.output.same_as(result)
    y = np.random.default_rng(1).normal(size=shape)
    found = after.epilogue.reference(y.reshape(-1, columns), [array.reshape(-1)] * len(after.epilogue.operands))
    np.testing.assert_allclose(found.reshape(shape), y + array)


def test_a_row_of_an_image_is_no_column():
    """Where both dimensions are columns, an operand along one of them ends the epilogue; one over both is taken."""
    row, pixels, channel = (relax.const(np.ones(s, np.float32)) for s in ((1, 1, 1, 6), (1, 1, 4, 6), (3, 1, 1)))
    assert not absorbed((1, 3, 4, 6), 2, add, row)[0].covers[1:]
    for operand, inner, by_column in ((pixels, 2, True), (channel, 2, False), (row, 1, True)):
        (read,) = absorbed((1, 3, 4, 6), inner, add, operand)[0].epilogue.operands
        assert read.by_column is by_column


@pytest.mark.parametrize(("inner", "taken"), [(1, 1), (2, 0)])
def test_views_between_images_end_it(inner, taken):
    """A reshape may move what is a channel and what a pixel: none is seen through where both last are columns."""

    def tail(emit, y):
        return emit(op.nn.relu(emit(op.reshape(y, (12, 6)))))

    assert len(absorbed((1, 3, 4, 6), inner, tail)[0].epilogue.steps) == taken


def test_what_is_read_later_stays_outside():
    """A value that others read too ends the epilogue, with two column dimensions as with one."""

    def twice(emit, y):
        relu = emit(op.nn.relu(y))
        return emit(op.add(emit(op.exp(relu)), emit(op.sum(relu, keepdims=True))))

    for inner in (1, 2):
        after, _ = absorbed((1, 3, 4, 6), inner, twice)
        assert [step.op for step in after.epilogue.steps] == ["relu"]


def test_a_column_of_one_element():
    """Results of 1 x 1 pixels: every operand has all columns."""
    after, result = absorbed((2, 3, 1, 1), 2, add, relax.const(np.ones((3, 1, 1), np.float32)))
    assert after.output.same_as(result)
    y = np.arange(6.0).reshape(6, 1)
    operand = np.array([10, 20, 30], np.float32)
    np.testing.assert_array_equal(after.epilogue.reference(y, [operand])[:, 0], [10, 21, 32, 13, 24, 35])
