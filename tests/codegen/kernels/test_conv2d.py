"""Convolutions: kernel sizes, strides, dilations, paddings, groups, tails."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from graphopt.codegen.kernels.conv2d import Conv2d, window
from graphopt.codegen.kernels.gemm import Gemm
from graphopt.errors import Decline
from tests.codegen.kernels.dense import QUICK, TAILS, Shape, check, convolution
from tests.codegen.kernels.harness import match, relax_main

SMALL = st.integers(1, 3)
PAIR = st.tuples(SMALL, SMALL)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Convolutions with at least one result."""
    kernel, dilation, groups = draw(PAIR), draw(PAIR), draw(st.sampled_from([1, 1, 1, 2, 3]))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    return Shape(
        size=(draw(st.integers(span[0], 12)), draw(st.integers(span[1], 12))),
        cin=groups * draw(st.integers(1, 9)),
        cout=groups * draw(st.integers(1, 20)),
        kernel=kernel,
        strides=draw(PAIR),
        dilation=dilation,
        padding=tuple(draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))),
        groups=groups,
        batch=draw(st.sampled_from([1, 1, 2])),
    )


@QUICK
@given(st.lists(st.tuples(shapes(), st.sampled_from(sorted(TAILS))), min_size=16, max_size=16))
def test_random_geometry_and_tails(cases):
    """Any geometry with any tail equals PyTorch in float64."""
    check([convolution(s, tail, Conv2d(), i) for i, (s, tail) in enumerate(cases)])


def test_stems_and_downsampling():
    """Three channels with large kernels, patches, strided 1 x 1, padding that is not the same on all sides."""
    check(
        [
            convolution(Shape((30, 31), 3, 16, (7, 7), (2, 2), padding=(3, 3, 3, 3)), "bias", Conv2d()),
            convolution(Shape((32, 32), 3, 24, (16, 16), (16, 16)), "bias", Conv2d()),
            convolution(Shape((14, 14), 64, 40, (1, 1), (2, 2)), "bias", Conv2d()),
            convolution(Shape((33, 40), 3, 8, (3, 3), (2, 2), padding=(0, 0, 1, 1), batch=2), "relu6", Conv2d()),
            convolution(Shape((56, 57), 32, 32, padding=(1, 1, 1, 1)), "residual_relu", Conv2d()),
        ],
    )


def test_pointwise_is_a_product():
    """A plain 1 x 1 convolution is taken by the matrix product."""
    check([convolution(Shape((7, 9), 24, 20, (1, 1), batch=2), t, Gemm()) for t in ("bias", "gate", "table")])


def test_plain_products_only():
    """The matrix product leaves strided and padded convolutions to this one."""
    with pytest.raises(AssertionError, match="not a plain 1 x 1"):
        convolution(Shape((8, 8), 4, 8, (1, 1), (2, 2)), "none", Gemm())


def test_layout_is_named():
    """NCHW is declined with its name."""
    x = relax.Var("x", relax.TensorType((1, 4, 8, 8), "float32"))
    w = relax.Var("w", relax.TensorType((4, 4, 3, 3), "float32"))
    flow = relax_main(lambda b: b.emit(relax.op.nn.conv2d(x, w)), [x, w])
    declined = match(flow, Conv2d())
    assert isinstance(declined, Decline)
    assert "NCHW" in declined.reason
    assert isinstance(window(flow, flow.bindings[0].value), str)
