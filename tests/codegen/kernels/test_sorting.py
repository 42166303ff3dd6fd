"""Sort, argsort and top-k: every length around the powers of two, every axis and dtype, ties, NaN; what is matched."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from tvm import relax

from graphopt.codegen.kernels import sorting
from graphopt.codegen.kernels.sorting import Order
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from tests.codegen.kernels.harness import HOST, Library, aligned, match, relax_main

LENGTHS = (1, 2, 3, 5, 8, 9, 31, 64, 65, 100, 1000)
DTYPES = ("float32", "float16", "bfloat16", "float64", "int8", "int32", "int64", "uint8", "uint32", "uint64", "bool")

ORDERS = {
    **{f"sort_{n}": Order(2, n, 3, "float32", False, True, "") for n in LENGTHS},
    **{f"argsort_{n}": Order(2, n, 1, "float32", True, False, "int32") for n in LENGTHS},
    **{f"top_{n}_{k}": Order(1, n, 2, "float32", True, True, "int64", k) for n in LENGTHS for k in (1, 3, 7) if k <= n},
    **{f"all_of_{n}": Order(1, n, 1, "float32", False, True, "int64", n) for n in LENGTHS},
    **{f"sort_{d}": Order(2, 37, 2, d, False, True, "int64") for d in DTYPES},
    **{f"topk_{d}": Order(2, 37, 2, d, True, True, "int64", 5) for d in DTYPES},
    "topk_indices": Order(3, 50, 1, "float32", False, False, "int32", 4),
    "topk_values": Order(3, 50, 1, "float32", False, True, "", 4),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    kernels = {name: sorting.build(order, HOST) for name, order in ORDERS.items()}
    return Library(kernels, tmp_path_factory.mktemp("sort"))


def data(order: Order) -> np.ndarray:
    """Few distinct values, so that many are equal; both zeros and infinities and NaN among floats."""
    generator = np.random.default_rng(order.n)
    shape = (order.outer, order.n, order.inner)
    kind = getattr(ml_dtypes, order.dtype, None) or np.dtype(order.dtype)
    if "float" not in order.dtype:
        low, high = (0, 1) if order.dtype == "bool" else (np.iinfo(kind).min, np.iinfo(kind).max)
        choices = np.array(sorted({low, high, high // 2, min(high, 3), 1, 0}), kind)
        return aligned(generator.choice(choices, shape))
    x = generator.integers(-9, 9, shape).astype("float64") / 4
    for special in (-0.0, np.nan, np.inf, -np.inf, -np.nan):
        x[generator.random(shape) < 0.05] = special
    return aligned(x.astype(kind))


def call(library: Library, name: str, x: np.ndarray) -> list[np.ndarray]:
    order = ORDERS[name]
    shape = (order.outer, order.kept, order.inner)
    results = [aligned(np.zeros(shape, x.dtype))] * order.values
    results += [aligned(np.zeros(shape, order.indices or "int32"))] * bool(order.indices)
    scratch = [aligned(np.zeros(size, kind)) for _, size, kind in order.scratch]
    library(name, x, *results, *scratch)
    return results


@pytest.mark.parametrize("name", ORDERS)
def test_equals_reference(library, name):
    """Values bit by bit and indices are those of a stable sort."""
    order = ORDERS[name]
    x = data(order)
    values, indices = sorting.reference(x, order)
    results = call(library, name, x)
    if order.values:
        assert results[0].tobytes() == np.ascontiguousarray(values).tobytes()
    if order.indices:
        np.testing.assert_array_equal(results[-1], indices)


@pytest.mark.parametrize("descending", [False, True])
def test_reference_is_pytorch(descending):
    """The reference orders ties, zeros and NaN as torch.sort(stable=True) does, and so the kernel does."""
    order = Order(3, 200, 2, "float32", descending, True, "int64")
    x = data(order)
    values, indices = torch.sort(torch.from_numpy(x), dim=1, stable=True, descending=descending)
    np.testing.assert_array_equal(sorting.reference(x, order)[0], values.numpy())
    np.testing.assert_array_equal(sorting.reference(x, order)[1], indices.numpy())


def test_whole_operator_is_matched():
    """Each operator on a middle axis becomes one call, with its scratch."""
    x = relax.Var("x", relax.TensorType((2, 90, 4), "float16"))
    counts = 4 * 4 * sorting.DIGIT
    for build, scratch in (
        (lambda b: b.emit(relax.op.sort(x, 1)), (4 * 180, 4 * 180, counts)),
        (lambda b: b.emit(relax.op.argsort(x, -2, True)), (4 * 180, 4 * 180, counts)),
        (lambda b: b.emit(relax.op.topk(x, 3, 1)), (12, 12)),
        (lambda b: b.emit(relax.op.topk(x, 40, 1)), (4 * 180, 4 * 180, counts)),
        (lambda b: b.emit(relax.op.argsort(x, 0)), (8, 8)),
    ):
        found = match(relax_main(build, [x]), sorting.Sorting(), HOST)
        assert isinstance(found, KernelCall)
        assert found.scratch_bytes == scratch


def test_nothing_to_sort_is_declined():
    """A tensor without elements is left alone, with the reason."""
    x = relax.Var("x", relax.TensorType((2, 0), "float32"))
    found = match(relax_main(lambda b: b.emit(relax.op.sort(x, 1)), [x]), sorting.Sorting(), HOST)
    assert isinstance(found, Decline)
    assert "without elements" in found.reason
