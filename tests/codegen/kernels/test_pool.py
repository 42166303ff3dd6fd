"""Pooling: every kind of window against the reference, and the reference against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tvm import relax

from graphopt.codegen.kernels.pool import Axis, Pool, Shape, build, reference
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from tests.codegen.kernels.harness import HOST, Library, aligned, match, relax_main

SAME, PLAIN = Axis(7, 4, 3, 2, 1, 1, 1), Axis(9, 5, 3, 2, 1, 1, 1)
CASES = {
    "max": Shape(2, SAME, PLAIN, 13, "float32", True),
    "average": Shape(2, SAME, PLAIN, 13, "float32", False),
    "padding_counts": Shape(2, SAME, PLAIN, 13, "float32", False, True),
    "dilated": Shape(1, Axis(9, 5, 3, 1, 2), Axis(9, 7, 3, 1, 2, 1, 1), 8, "float32", True),
    "ceil": Shape(1, Axis(6, 3, 3, 2), Axis(6, 3, 3, 2), 8, "float32", False, True),
    "mean": Shape(1, Axis(7, 1), Axis(5, 1), 200, "float32", False),
    "adaptive": Shape(2, Axis(7, 3), Axis(10, 4), 5, "float32", False),
    "one_pixel": Shape(1, Axis(1, 1, 2, 2, 1, 1, 1), Axis(1, 1), 1, "float32", True),
    "wide": Shape(1, Axis(56, 28, 3, 2, 1, 1, 1), Axis(56, 28, 3, 2, 1, 1, 1), 72, "float32", True),
    "half": Shape(1, SAME, SAME, 9, "float16", False),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library({n: build(s, HOST) for n, s in CASES.items()}, tmp_path_factory.mktemp("pool"))


def data(s: Shape) -> np.ndarray:
    shape = (s.batch, s.rows.size, s.columns.size, s.channels)
    return aligned(np.random.default_rng(0).normal(size=shape).astype(s.dtype))


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(library, name):
    """Windows cut by the border, padding, dilation, rests of channels."""
    s = CASES[name]
    x = data(s)
    y = aligned(np.zeros((s.batch, s.rows.outputs, s.columns.outputs, s.channels), s.dtype))
    library(name, x, y)
    np.testing.assert_allclose(y, reference(x.astype(float), s), atol=1e-6 if s.dtype == "float32" else 1e-3)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("max", lambda x: F.max_pool2d(x, 3, 2, 1)),
        ("average", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
        ("padding_counts", lambda x: F.avg_pool2d(x, 3, 2, 1)),
        ("ceil", lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True)),
        ("mean", lambda x: x.mean((2, 3), keepdim=True)),
        ("adaptive", lambda x: F.adaptive_avg_pool2d(x, (3, 4))),
    ],
)
def test_reference_is_pytorch(name, function):
    """The windows are PyTorch's."""
    x = data(CASES[name])
    expected = function(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(reference(x.astype(float), CASES[name]), expected, atol=1e-6)


def test_other_layouts_are_declined():
    """NCHW is left to the generic schedule; NHWC and a mean over height and width are taken."""
    x = relax.Var("x", relax.TensorType((1, 8, 8, 4), "float32"))
    for layout in ("NHWC", "NCHW"):
        flow = relax_main(lambda b, la=layout: relax.op.nn.max_pool2d(x, (2, 2), (2, 2), layout=la), [x])
        assert isinstance(match(flow, Pool()), KernelCall if layout == "NHWC" else Decline)
    assert isinstance(match(relax_main(lambda b: relax.op.mean(x, [1, 2]), [x]), Pool()), KernelCall)
    assert isinstance(match(relax_main(lambda b: relax.op.mean(x, [3]), [x]), Pool()), Decline)
