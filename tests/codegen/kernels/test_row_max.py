"""The greatest element of each row: widths around the vectors, ties, NaN, infinities; what is matched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tvm import relax

from graphopt.codegen.kernels import row_max
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, aligned, assembly, fenced, match, relax_main

WIDTHS = (1, 2, 3, 7, 8, 9, 15, 16, 31, 33, 64, 100, 257)
ROWS = 40


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    kernels = {f"max_{n}": row_max.build(ROWS, n, HOST) for n in WIDTHS}
    return Library({**kernels, "threads": row_max.build(700, 100, HOST)}, tmp_path_factory.mktemp("row_max"))


def data(rows: int, n: int) -> np.ndarray:
    """Few distinct values, so that many are equal; some rows of -inf alone, some with one NaN or more."""
    generator = np.random.default_rng(n)
    x = (generator.integers(-9, 3, (rows, n)) / 4).astype("float32")
    for special, share in ((-0.0, 0.1), (-np.inf, 0.1), (np.inf, 0.01), (np.nan, 0.01), (-np.nan, 0.01)):
        x[generator.random(x.shape) < share] = special
    x[0] = -np.inf
    x[1] = np.nan
    return aligned(x)


def values_are_equal(got: np.ndarray, want: np.ndarray) -> None:
    """Equal as numbers: which zero is larger stays open, and which NaN."""
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n", WIDTHS)
def test_equals_pytorch(library, n):
    """Value and index are torch.max's: the first of equal ones, the first NaN, 0 in a row of -inf."""
    x = data(ROWS, n)
    (values, clean), (indices, also) = fenced(np.zeros(ROWS, "float32")), fenced(np.zeros(ROWS, "int64"))
    library(f"max_{n}", x, values, indices)
    want = torch.from_numpy(x).max(-1)
    values_are_equal(values, want.values.numpy())
    np.testing.assert_array_equal(indices, want.indices.numpy())
    np.testing.assert_array_equal(indices, row_max.reference(x)[1])
    assert clean()
    assert also()


def test_threads_share_rows(library):
    """Rows split over threads give the same."""
    x = data(700, 100)
    values, indices = aligned(np.zeros(700, "float32")), aligned(np.zeros(700, "int64"))
    library("threads", x, values, indices)
    np.testing.assert_array_equal(indices, torch.from_numpy(x).max(-1).indices.numpy())


@pytest.mark.parametrize(("target", "pattern"), [(HOST, "vblendvps"), (ARM, "fcmge\tv"), (WASM, "f32x4.le")])
def test_elements_are_compared_in_vectors(target, pattern):
    """Every target compares whole vectors."""
    assert pattern in assembly(row_max.build(3, 64, target), target)


def test_maxima_are_matched_and_the_rest_declined():
    """k = 1 over the last axis is taken; other axes, more elements, the least and float64 are not, with the reason."""

    def found(dtype="float32", k=1, axis=-1, largest=True):
        x = relax.Var("x", relax.TensorType((2, 9, 4), dtype))
        flow = relax_main(lambda b: b.emit(relax.op.topk(x, k, axis, "both", largest, "int64")), [x])
        return match(flow, row_max.RowMax(), HOST)

    assert isinstance(found(), KernelCall)
    for options in ({"k": 2}, {"axis": 1}, {"largest": False}, {"dtype": "float64"}):
        assert isinstance(found(**options), Decline)
