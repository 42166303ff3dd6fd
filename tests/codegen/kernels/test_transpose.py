"""Transposes: every order of the dimensions that two groups make, sides about a vector's length."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from graphopt.codegen.kernels import transpose
from graphopt.codegen.kernels.emit import load, prim_func, store
from graphopt.codegen.kernels.squares import transposed
from graphopt.codegen.kernels.template import KernelCall
from graphopt.codegen.kernels.transpose import Transpose, plain
from graphopt.errors import Decline
from graphopt.targets.target import AVX512, SIMD128, Target
from tests.codegen.kernels.dense import QUICK
from tests.codegen.kernels.harness import HOST, Library, fenced, match, relax_main

TARGETS = (HOST, replace(HOST, isa=SIMD128), replace(HOST, isa=AVX512))
SHAPES = [(1,), (7,), (1, 1), (4, 5), (2, 3, 4), (2, 1, 3), (1, 2, 3, 2), (2, 3, 1, 4), (1, 1, 5, 1)]


def call_of(shape: tuple[int, ...], axes: list[int], target: Target = HOST, dtype: str = "float32"):
    x = relax.Var("x", relax.TensorType(shape, dtype))
    return match(relax_main(lambda b: b.emit(relax.op.permute_dims(x, axes)), [x]), Transpose(), target)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_order(shape):
    """(batch, rows, columns) of any order is the same transpose, and None exactly where no such three are."""
    x = np.arange(np.prod(shape)).reshape(shape)
    for axes in itertools.permutations(range(len(shape))):
        sides, wanted = plain(shape, list(axes)), x.transpose(axes).reshape(-1)
        if sides is not None:
            assert np.prod(sides) == x.size
            np.testing.assert_array_equal(np.swapaxes(x.reshape(sides), 1, 2).reshape(-1), wanted)
            continue
        real = [n for n in range(1, x.size + 1) if x.size % n == 0]
        turns = [(b, m, x.size // b // m) for b in real for m in real if x.size % (b * m) == 0]
        same = [t for t in turns if (np.swapaxes(x.reshape(t), 1, 2).reshape(-1) == wanted).all()]
        # One side of one element is no transpose but the tensor itself.
        assert all(1 in turn[1:] for turn in same)


SIDES = st.tuples(
    st.integers(1, 3), *[st.one_of(st.integers(4, 40), st.sampled_from([4, 7, 8, 9, 15, 16, 17, 31, 33]))] * 2
)


@pytest.mark.parametrize("parallel", [True, False], ids=["threads", "one thread"])
@settings(QUICK, max_examples=2)
@given(st.lists(st.tuples(SIDES, st.sampled_from(TARGETS)), min_size=10, max_size=10))
def test_any_sides(parallel, cases):
    """Sides below, at and above multiples of a vector; every element is written, once or twice the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transpose, "PARALLEL_ELEMENTS", 1 if parallel else 1 << 60)
        calls = [call_of(sides, [0, 2, 1], target) for sides, target in cases]
    assert all(isinstance(call, KernelCall) for call in calls), calls
    with TemporaryDirectory() as folder:
        library = Library({f"k{n}": call.kernel for n, call in enumerate(calls)}, Path(folder))
    for n, (sides, _) in enumerate(cases):
        x, _ = fenced(np.arange(np.prod(sides), dtype=np.float32).reshape(sides))
        wanted = Transpose().reference(x)
        y, intact = fenced(np.full(wanted.shape, np.nan, np.float32))
        library(f"k{n}", x, y)
        assert intact()
        np.testing.assert_array_equal(y, wanted, err_msg=str(sides))


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_squares_in_registers(lanes, tmp_path):
    """Vector i of the result has element i of each vector."""

    def body(x, y) -> None:
        square = [load(x, n * lanes, lanes, "float32") for n in range(lanes)]
        for n, vector in enumerate(transposed(square, lanes)):
            store(y, n * lanes, vector, lanes, "float32")

    library = Library({"k": prim_func([(name, lanes * lanes, "float32") for name in "xy"], body)}, tmp_path)
    x, _ = fenced(np.arange(lanes * lanes, dtype=np.float32).reshape(lanes, lanes))
    y, intact = fenced(np.full_like(x, np.nan))
    library("k", x, y)
    assert intact()
    np.testing.assert_array_equal(y, x.T)


def test_images_between_layouts():
    """NCHW to NHWC and back are transposes of a channel's pixels."""
    assert plain((2, 8, 5, 6), [0, 2, 3, 1]) == (2, 8, 30)
    assert plain((2, 5, 6, 8), [0, 3, 1, 2]) == (2, 30, 8)
    assert call_of((1, 8, 5, 6), [0, 2, 3, 1]).parameters == {"lanes": 8}
    assert call_of((1, 5, 5, 6), [0, 2, 3, 1]).parameters == {"lanes": 4}


@pytest.mark.parametrize(
    ("shape", "axes", "dtype", "reason"),
    [
        ((4, 5, 6), [2, 1, 0], "float32", "no plain transpose"),
        ((2, 4, 5, 6), [0, 2, 1, 3], "float32", "no plain transpose"),
        ((4, 5, 6), [0, 1, 2], "float32", "no plain transpose"),
        ((3, 50), [1, 0], "float32", "3 x 50 elements"),
        ((0, 8, 8), [0, 2, 1], "float32", "elements"),
        ((8, 0), [1, 0], "float32", "elements"),
        ((8, 8), [1, 0], "float16", "float16"),
    ],
)
def test_others_are_declined(shape, axes, dtype, reason):
    """Orders of three groups, those that change nothing, short sides, nothing at all, other types."""
    declined = call_of(shape, axes, dtype=dtype)
    assert isinstance(declined, Decline)
    assert reason in declined.reason
