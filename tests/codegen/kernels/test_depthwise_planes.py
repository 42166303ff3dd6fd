"""Depthwise convolutions with channels in front: borders, strides, several rows at once, every tail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.codegen.kernels import depthwise_planes
from graphopt.codegen.kernels.depthwise_planes import DepthwisePlanes
from graphopt.codegen.kernels.epilogue import absorb
from graphopt.codegen.kernels.planes import Planes, window_of
from graphopt.targets.target import AVX512, NEON, SIMD128
from tests.codegen.kernels.channels_first import TAILS, convolution
from tests.codegen.kernels.dense import QUICK, Shape, check
from tests.codegen.kernels.harness import HOST

TARGETS = (HOST, *(replace(HOST, isa=isa) for isa in (SIMD128, NEON, AVX512)))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Depthwise convolutions with at least one result, padding up to more than the kernel."""
    kernel = draw(st.sampled_from([(3, 3), (3, 3), (5, 5), (1, 3), (3, 1), (2, 2), (7, 7)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    channels = draw(st.integers(1, 5))
    padding = tuple(draw(st.lists(st.integers(0, 4), min_size=4, max_size=4)))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    low = [max(1, s - padding[i] - padding[i + 2]) for i, s in enumerate(span)]
    return Shape(
        size=(draw(st.integers(low[0], 19)), draw(st.integers(low[1], 40))),
        cin=channels,
        cout=channels,
        kernel=kernel,
        strides=draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2), (3, 3)])),
        dilation=dilation,
        padding=padding,
        groups=channels,
        batch=draw(st.sampled_from([1, 1, 2])),
    )


@pytest.mark.parametrize("parallel", [True, False], ids=["threads", "one thread"])
@settings(QUICK, max_examples=2)
@given(st.lists(st.tuples(shapes(), st.sampled_from(sorted(TAILS)), st.sampled_from(TARGETS)), min_size=8, max_size=8))
def test_random_geometry_and_tails(parallel, cases):
    """Any geometry with any tail equals PyTorch in float64, cut into tasks or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise_planes, "FLOPS_PER_TASK", 1 if parallel else 1 << 60)
        built = [
            convolution(s, tail, DepthwisePlanes(), word="dense", seed=i, target=target)
            for i, (s, tail, target) in enumerate(cases)
        ]
    check(built)


def test_sizes_of_mobile_networks():
    """In place at both strides, copied where the columns of a strided image are odd, or one; zeros in the filter."""
    cases = []
    for size, kernel, stride in ((56, 3, 1), (56, 3, 2), (57, 3, 2), (14, 5, 1), (7, 3, 1), (1, 3, 1)):
        pad = kernel // 2
        shape = Shape((size, size), 6, 6, (kernel, kernel), (stride, stride), padding=(pad, pad, pad, pad), groups=6)
        cases.append(convolution(shape, "bias_relu6", DepthwisePlanes(), word="unstructured", keep=0.6))
    assert [bool(case.call.scratch_bytes) for case in cases] == [False, False, True, False, False, True]
    check(cases)


def test_channels_are_few_for_many_tasks():
    """Sixteen tasks for three channels, each its own planes."""
    shape = Shape((40, 7), 3, 3, (5, 5), (1, 3), padding=(2, 2, 2, 2), groups=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise_planes, "FLOPS_PER_TASK", 1)
        case = convolution(shape, "bias", DepthwisePlanes(), word="dense")
    planes = Planes(window_of(case.flow, case.flow.bindings[0].value), direct=False)
    assert case.call.scratch_bytes == (3 * planes.channel * 4,)
    check([case])


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (Shape((8, 8), 4, 8, groups=4), "4 channels to 8"),
        (Shape((8, 8), 4, 4, groups=2), "in 2 groups"),
        (Shape((9, 9), 2, 2, (8, 8), groups=2), "64 taps"),
    ],
    ids=["multiplier", "groups", "large filter"],
)
def test_others_are_declined(shape, reason):
    """Two results per channel, groups of several channels and large filters are left to others, and it says why."""
    with pytest.raises(AssertionError, match=reason):
        convolution(shape, "none", DepthwisePlanes(), word="dense")


def test_reference_is_the_kernel():
    """The reference of the template, tail included, is what the kernel must compute."""
    shape = Shape((9, 8), 3, 3, (3, 5), (2, 1), (1, 2), (1, 2, 0, 3), groups=3, batch=2)
    case = convolution(shape, "bias_residual_relu", DepthwisePlanes(), word="dense")
    call = case.flow.bindings[0].value
    after = absorb(case.flow, case.flow.bindings[0].var, 2)
    planes = Planes(window_of(case.flow, call), direct=False)
    weight = case.flow.constant(call.args[1])
    operands = [case.call.constants[-1], case.inputs[1]]
    out = DepthwisePlanes().reference(case.inputs[0], weight, planes, after.epilogue, operands)
    np.testing.assert_allclose(out.reshape(case.expected.shape), case.expected, rtol=1e-6, atol=1e-6)
