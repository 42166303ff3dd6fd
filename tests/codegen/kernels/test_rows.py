"""Layer norm, RMS norm, softmax and log softmax: kernels on every kind of row, and what is matched."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from graphopt.codegen.kernels import layer_norm, softmax
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from tests.codegen.kernels.harness import HOST, Library, aligned, match, relax_main

# Below a vector, one, one with a rest, several accumulators with and without a rest, one row, one column.
SHAPES = [(1, 1), (5, 1), (1, 8), (3, 7), (4, 9), (2, 32), (3, 33), (2, 71), (300, 384)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    kernels = {}
    for rows, width in SHAPES:
        at = f"{rows}x{width}"
        kernels[f"layer_{at}"] = layer_norm.build(rows, width, "float32", True, (True, True), 1e-5, HOST)
        kernels[f"rms_{at}"] = layer_norm.build(rows, width, "float32", False, (True, False), 1e-6, HOST)
        kernels[f"soft_{at}"] = softmax.build(rows, width, "float32", False, HOST)
        kernels[f"log_{at}"] = softmax.build(rows, width, "float32", True, HOST)
    kernels["half"] = softmax.build(4, 33, "float16", False, HOST)
    kernels["brain"] = softmax.build(4, 13, "bfloat16", False, HOST)
    return Library(kernels, tmp_path_factory.mktemp("rows"))


def data(*shape):
    return aligned(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_norms(library, shape):
    """Both norms equal their references in float64."""
    x, gamma, beta, y = data(*shape), data(shape[1]), data(shape[1], 1)[:, 0], aligned(np.zeros(shape, np.float32))
    beta = aligned(beta)
    at = f"{shape[0]}x{shape[1]}"
    library(f"layer_{at}", x, gamma, beta, y)
    np.testing.assert_allclose(y, layer_norm.reference(x.astype(float), gamma, beta, 1e-5, True), atol=1e-5)
    library(f"rms_{at}", x, gamma, y)
    np.testing.assert_allclose(y, layer_norm.reference(x.astype(float), gamma, None, 1e-6, False), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(library, shape):
    """Softmax and its logarithm equal their references, for large scores too."""
    x, y = aligned(data(*shape) * 50), aligned(np.zeros(shape, np.float32))
    at = f"{shape[0]}x{shape[1]}"
    library(f"soft_{at}", x, y)
    np.testing.assert_allclose(y, softmax.reference(x.astype(float), False), atol=1e-6)
    library(f"log_{at}", x, y)
    np.testing.assert_allclose(y, softmax.reference(x.astype(float), True), atol=2e-5, rtol=1e-6)


def test_softmax_of_nothing_is_nan(library):
    """A row of -inf gives NaN, as in PyTorch; its neighbours are untouched."""
    x, y = data(4, 9), aligned(np.zeros((4, 9), np.float32))
    x[1] = -np.inf
    library("soft_4x9", x, y)
    assert np.isnan(y[1]).all()
    np.testing.assert_allclose(y[[0, 2, 3]].sum(1), 1, rtol=1e-6)


def test_half_precision(library):
    """float16 rows are computed in float32."""
    x, y = aligned(data(4, 33).astype(np.float16)), aligned(np.zeros((4, 33), np.float16))
    library("half", x, y)
    np.testing.assert_allclose(y, softmax.reference(x.astype(float), False), rtol=2e-3)


def test_brain_floats(library):
    """bfloat16 too, in the rest of a row, whose sum is a binding: TVM forgets to widen there."""
    x = aligned(data(4, 13).astype(ml_dtypes.bfloat16))
    y = aligned(np.zeros_like(x))
    library("brain", x, y)
    np.testing.assert_allclose(y.astype(float), softmax.reference(x.astype(float), False), rtol=1e-2)


def variable(*shape, dtype="float32"):
    return relax.Var("x", relax.TensorType(shape, dtype))


def test_decomposed_rms_norm_is_found():
    """x * rsqrt(mean(x^2) + eps) * weight becomes one kernel that covers all six operators."""
    x, weight = variable(2, 5, 16), relax.const(np.ones(16, np.float32))

    def build(b):
        mean = b.emit(relax.op.mean(b.emit(relax.op.power(x, relax.const(2.0))), axis=[-1], keepdims=True))
        root = b.emit(relax.op.rsqrt(b.emit(relax.op.add(mean, relax.const(1e-6)))))
        return relax.op.multiply(b.emit(relax.op.multiply(x, root)), weight)

    call = match(relax_main(build, [x]), layer_norm.LayerNorm())
    assert isinstance(call, KernelCall)
    assert len(call.covers) == 6


def test_what_is_not_the_last_axis_is_declined():
    """Softmax over another axis is left to the generic schedule, with the reason."""
    x = variable(2, 5, 16)
    result = match(relax_main(lambda b: relax.op.nn.softmax(x, axis=1), [x]), softmax.Softmax())
    assert isinstance(result, Decline)
    assert "not the last" in result.reason
