"""Pooling with channels in front: every kind of window against PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from graphopt.codegen.kernels import pool_planes
from graphopt.codegen.kernels.planes import Planes
from graphopt.codegen.kernels.pool_planes import PoolPlanes
from graphopt.errors import Decline
from graphopt.targets.target import AVX512, NEON, SIMD128, Target
from tests.codegen.kernels.dense import QUICK, Case, Emit, Pair, Program, case_of, check
from tests.codegen.kernels.harness import HOST, match, relax_main

TARGETS = (HOST, *(replace(HOST, isa=isa) for isa in (SIMD128, NEON, AVX512)))


@dataclass(frozen=True)
class Shape:
    """A pooling; padding as (top, left, bottom, right)."""

    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    channels: int = 3
    batch: int = 1


def pooling(s: Shape, largest: bool, seed: int = 0, target: Target = HOST) -> Case:
    """max_pool2d or avg_pool2d, which counts the padding."""
    p = Program(seed)

    def emit(e: Emit) -> Pair:
        x, xv = p.input(s.batch, s.channels, *s.size)
        top, left, bottom, right = s.padding
        around = -math.inf if largest else 0.0
        padded = F.pad(xv, (left, right, top, bottom), value=around)
        if largest:
            y = relax.op.nn.max_pool2d(x, s.kernel, s.strides, s.padding, s.dilation)
            return e(y), F.max_pool2d(padded, s.kernel, s.strides, 0, s.dilation)
        y = relax.op.nn.avg_pool2d(x, s.kernel, s.strides, s.padding, s.dilation, count_include_pad=True)
        # PyTorch's has no dilation; a mean of taps by hand.
        out = F.max_pool2d(padded, s.kernel, s.strides, 0, s.dilation).shape[2:]
        taps = [
            padded[:, :, i * s.dilation[0] :: s.strides[0], j * s.dilation[1] :: s.strides[1]][..., : out[0], : out[1]]
            for i in range(s.kernel[0])
            for j in range(s.kernel[1])
        ]
        return e(y), torch.stack(taps).mean(0)

    return case_of(p, emit, PoolPlanes(), target)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Poolings with at least one result."""
    kernel = draw(st.sampled_from([(2, 2), (3, 3), (3, 3), (5, 5), (1, 3), (3, 2), (7, 7)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 2), (1, 3)]))
    padding = tuple(draw(st.integers(0, k // 2)) for k in (*kernel, *kernel))
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    low = [max(1, s - padding[i] - padding[i + 2]) for i, s in enumerate(span)]
    return Shape(
        size=(draw(st.integers(low[0], low[0] + 12)), draw(st.integers(low[1], low[1] + 36))),
        kernel=kernel,
        strides=draw(st.sampled_from([(1, 1), (2, 2), (2, 2), (3, 3), (1, 2), kernel])),
        dilation=dilation,
        padding=padding,
        channels=draw(st.integers(1, 4)),
        batch=draw(st.sampled_from([1, 1, 2])),
    )


@pytest.mark.parametrize("parallel", [True, False], ids=["threads", "one thread"])
@settings(QUICK, max_examples=2)
@given(st.lists(st.tuples(shapes(), st.booleans(), st.sampled_from(TARGETS)), min_size=10, max_size=10))
def test_random_geometry(parallel, cases):
    """Any window equals PyTorch in float64, cut into tasks or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_planes, "FLOPS_PER_TASK", 1 if parallel else 1 << 60)
        built = [pooling(s, largest, i, target) for i, (s, largest, target) in enumerate(cases)]
    check(built, whole=False)


def test_sizes_of_networks():
    """The stem's max pooling, halves, means of whole images, and windows of one pixel."""
    stem = Shape((56, 56), (3, 3), (2, 2), padding=(1, 1, 1, 1))
    shapes = [stem, Shape((28, 28), (2, 2), (2, 2)), Shape((7, 7), (7, 7)), Shape((1, 1), (1, 1))]
    cases = [pooling(s, largest) for s in shapes for largest in (True, False)]
    assert not cases[0].call.scratch_bytes
    check(cases, whole=False)


def test_windows_that_see_nothing():
    """Between the taps of a dilated window the whole image may fall: the largest of nothing is -inf, its mean 0."""
    shape = Shape((4, 9), (2, 1), (1, 1), (5, 1), (1, 0, 1, 0))
    copied = Shape((9, 4), (1, 2), (1, 1), (1, 5), (0, 1, 0, 1))
    check([pooling(s, largest) for s in (shape, copied) for largest in (True, False)], whole=False)


def test_what_counts_otherwise_is_declined():
    """Means over fewer pixels at the borders, results that look beyond the padding, NHWC, other types."""
    x, half = (relax.Var("x", relax.TensorType((1, 3, 8, 8), dtype)) for dtype in ("float32", "float16"))
    pool = relax.op.nn
    for value, param, reason in (
        (pool.avg_pool2d(x, (3, 3), (2, 2), (1, 1)), x, "fewer pixels"),
        (pool.max_pool2d(x, (3, 3), (2, 2), (0, 0), ceil_mode=True), x, "beyond the padding"),
        (pool.max_pool2d(x, (3, 3), layout="NHWC"), x, "NHWC"),
        (pool.max_pool2d(half, (3, 3)), half, "float16"),
    ):
        declined = match(relax_main(lambda b, v=value: b.emit(v), [param]), PoolPlanes())
        assert isinstance(declined, Decline)
        assert reason in declined.reason


@pytest.mark.parametrize("largest", [True, False], ids=["max", "average"])
def test_reference_is_pytorch(largest):
    """The template's reference has PyTorch's windows."""
    case = pooling(Shape((9, 8), (3, 2), (2, 1), (1, 2), (1, 0, 1, 1)), largest)
    call = case.flow.bindings[0].value
    g = pool_planes.Window(1, 9, 8, 3, (3, 2), (2, 1), (1, 2), tuple(int(p) for p in call.attrs.padding))
    planes = Planes(g, direct=False, fill=-math.inf if largest else 0.0)
    np.testing.assert_allclose(PoolPlanes().reference(case.inputs[0], planes, largest), case.expected, atol=1e-6)
