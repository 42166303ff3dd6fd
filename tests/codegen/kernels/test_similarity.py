"""Maxima of a product's rows: sizes around the tiles, batches, ties, NaN, epilogues; what is matched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tvm import relax

from graphopt.codegen.kernels.similarity import Similarity
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from tests.codegen.kernels.harness import HOST, Library, aligned, fenced, match, relax_main

# batch, m, k, n
SIZES = {
    "tiny": (1, 1, 1, 1),
    "narrow": (2, 5, 3, 2),
    "row": (1, 1, 16, 33),
    "tome": (1, 99, 64, 98),
    "odd": (3, 37, 17, 41),
    "one_column": (1, 9, 8, 1),
    "wide": (1, 13, 8, 300),
    "threads": (2, 150, 24, 130),
}


def variables(batch, m, k, n):
    return [relax.Var(v, relax.TensorType(s, "float32")) for v, s in (("a", (batch, m, k)), ("b", (batch, k, n)))]


def max_of_product(b, a_b, after=lambda b, s: s):
    scores = after(b, b.emit(relax.op.matmul(*a_b)))
    return b.emit(relax.op.topk(scores, 1, -1, "both", True, "int64"))


def scratch(call: KernelCall) -> list[np.ndarray]:
    return [aligned(np.zeros(size // 4, t)) for size, t in zip(call.scratch_bytes, ("float32", "int32"), strict=True)]


@pytest.fixture(scope="module")
def calls():
    def made(sizes):
        params = variables(*sizes)
        call = match(relax_main(lambda b: max_of_product(b, params), params), Similarity(), HOST)
        assert isinstance(call, KernelCall)
        return call

    return {name: made(sizes) for name, sizes in SIZES.items()}


@pytest.fixture(scope="module")
def library(calls, tmp_path_factory):
    return Library({n: c.kernel for n, c in calls.items()}, tmp_path_factory.mktemp("similarity"))


@pytest.mark.parametrize("name", SIZES)
def test_equals_pytorch(library, calls, name):
    """Small integers, so that products are exact and many equal: the index is the first, NaN before all else."""
    batch, m, k, n = SIZES[name]
    generator = np.random.default_rng(m)
    a, b = (generator.integers(-1, 2, s).astype("float32") for s in ((batch, m, k), (batch, k, n)))
    b[0, 0, n // 2] = np.nan  # in every row's scores of the first sample
    if batch > 1:
        a[1, 0] = -np.inf  # some infinities of both signs, and NaN where they meet zeros
    a[-1, -1] = 0
    (values, clean), (indices, also) = (fenced(np.zeros(batch * m, t)) for t in ("float32", "int64"))
    library(name, aligned(a), aligned(b), values, indices, *scratch(calls[name]))
    want = torch.matmul(torch.from_numpy(a), torch.from_numpy(b)).max(-1)
    np.testing.assert_array_equal(values, want.values.numpy().reshape(-1))
    np.testing.assert_array_equal(indices, want.indices.numpy().reshape(-1))
    assert clean()
    assert also()


def test_elementwise_operators_between_are_taken_along(tmp_path):
    """A mask that is added to the scores is added in the kernel."""
    params = [*variables(1, 7, 8, 20), relax.Var("mask", relax.TensorType((7, 1), "float32"))]

    def masked(b, scores):
        return b.emit(relax.op.add(scores, params[2]))

    call = match(relax_main(lambda b: max_of_product(b, params[:2], masked), params), Similarity(), HOST)
    assert isinstance(call, KernelCall)
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((7, 8), "float32"), generator.standard_normal((8, 20), "float32")
    mask = np.array([[-np.inf], *[[i] for i in range(6)]], "float32")
    values, indices = aligned(np.zeros(7, "float32")), aligned(np.zeros(7, "int64"))
    given = *map(aligned, (a, b, mask)), values, indices, *scratch(call)
    Library({"masked": call.kernel}, tmp_path)("masked", *given)
    want = torch.from_numpy(a @ b + mask).max(-1)
    np.testing.assert_allclose(values, want.values, rtol=1e-5)
    np.testing.assert_array_equal(indices, want.indices)


def test_scores_with_another_reader_are_left_alone():
    """Where the scores themselves are wanted, or more than the greatest, the product is written."""
    params = variables(1, 9, 8, 20)

    def kept(b):
        scores = b.emit(relax.op.matmul(*params))
        best = b.emit(relax.op.topk(scores, 1, -1, "both", True, "int64"))
        return relax.Tuple([scores, b.emit(best[0])])

    def two(b):
        return b.emit(relax.op.topk(b.emit(relax.op.matmul(*params)), 2, -1, "both", True, "int64"))

    for build in (kept, two):
        assert isinstance(match(relax_main(build, params), Similarity(), HOST), Decline)
