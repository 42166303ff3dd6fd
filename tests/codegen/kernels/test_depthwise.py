"""Depthwise convolutions: borders, strides, channels that do not fill a vector."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.codegen.kernels.depthwise import DepthwiseConv2d
from tests.codegen.kernels.dense import QUICK, TAILS, Shape, check, convolution


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Depthwise convolutions with at least one result, padding up to more than the kernel."""
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (1, 3), (3, 1), (2, 2), (7, 7)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    channels = draw(st.integers(1, 27))
    padding = tuple(draw(st.lists(st.integers(0, 4), min_size=4, max_size=4)))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    low = [max(1, s - padding[i] - padding[i + 2]) for i, s in enumerate(span)]
    return Shape(
        size=(draw(st.integers(low[0], 19)), draw(st.integers(low[1], 30))),
        cin=channels,
        cout=channels,
        kernel=kernel,
        strides=draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 3)])),
        dilation=dilation,
        padding=padding,
        groups=channels,
        batch=draw(st.sampled_from([1, 1, 2])),
    )


@QUICK
@given(st.lists(st.tuples(shapes(), st.sampled_from(sorted(TAILS))), min_size=12, max_size=12))
def test_random_geometry_and_tails(cases):
    """Any geometry with any tail equals PyTorch in float64."""
    check([convolution(s, tail, DepthwiseConv2d(), i) for i, (s, tail) in enumerate(cases)])


def test_sizes_of_mobile_networks():
    """Wide rows take the loop over inner strips, with and without threads."""
    check(
        [
            convolution(Shape((h, h), c, c, strides=(s, s), padding=(1, 1, 1, 1), groups=c), "relu6", DepthwiseConv2d())
            for h, c, s in ((56, 24, 1), (57, 16, 2), (7, 40, 1), (14, 12, 2))
        ],
    )


def test_multiplier_is_declined():
    """Two results per channel are left to the grouped convolution."""
    with pytest.raises(AssertionError, match="4 channels to 8"):
        convolution(Shape((8, 8), 4, 8, groups=4), "none", DepthwiseConv2d())
