"""Cumulative sums and products: widths around the vectors, dtypes, precision; what is matched."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from graphopt.codegen.kernels import scan
from graphopt.codegen.kernels.scan import Running
from graphopt.codegen.kernels.template import KernelCall
from tests.codegen.kernels.harness import HOST, Library, aligned, assembly, match, relax_main

WIDTHS = (1, 3, 4, 7, 16, 17, 33, 100)
TYPES = (
    ("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("float64", "float64"),
    ("int32", "int64"), ("int64", "int64"), ("bool", "int64"), ("int32", "int32"), ("float32", "float64"),
    ("int8", "int8"), ("uint8", "int64"), ("int32", "float32"),
)  # fmt: skip

SCANS = {
    **{f"sum_{w}": Running(3, 11, w, "float32", "float32", False) for w in WIDTHS},
    **{f"product_{w}": Running(2, 6, w, "float32", "float32", True) for w in WIDTHS},
    **{f"{a}_{b}_{w}": Running(2, 5, w, a, b, False) for a, b in TYPES for w in (1, 21)},
    "exclusive_sum": Running(2, 9, 10, "float32", "float32", False, exclusive=True),
    "exclusive_product": Running(2, 9, 1, "float32", "float32", True, exclusive=True),
    "parallel": Running(70, 40, 37, "float32", "float32", False),
    "long": Running(1, 100_000, 1, "float32", "float32", False),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library({name: scan.build(s, HOST) for name, s in SCANS.items()}, tmp_path_factory.mktemp("scan"))


@pytest.mark.parametrize("name", SCANS)
def test_equals_reference(library, name):
    """Any width, type and variant gives the running value of numpy, in the same precision."""
    s = SCANS[name]
    kinds = [getattr(ml_dtypes, d, None) or np.dtype(d) for d in (s.source, s.dtype)]
    x = np.random.default_rng(s.n + s.inner).uniform(-2, 3, (s.outer, s.n, s.inner)).astype(kinds[0])
    y = aligned(np.zeros(x.shape, kinds[1]))
    library(name, aligned(x), y)
    np.testing.assert_allclose(y.astype("float64"), scan.reference(x, s).astype("float64"), rtol=1e-6)


def test_neighbouring_columns_are_vectors():
    """Across an outer axis whole vectors are added: no scalar additions where the width is a multiple."""
    text = assembly(scan.build(Running(2, 64, 64, "float32", "float32", False), HOST), HOST)
    assert text.count("vaddpd\t") >= scan.MOST_VECTORS
    assert "vaddsd\t" not in text


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_every_axis_is_matched(axis):
    """Any axis, or none for the flattened tensor, becomes one call without scratch."""
    x = relax.Var("x", relax.TensorType((2, 9, 4), "float32"))
    found = match(relax_main(lambda b: b.emit(relax.op.cumsum(x, axis)), [x]), scan.Scan(), HOST)
    assert isinstance(found, KernelCall)
    assert found.scratch_bytes == ()
