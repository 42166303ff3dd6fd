"""Rows written to rows: widths around the vectors, dtypes, duplicates, bad indices, threads; what is matched."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tvm import relax

from graphopt.codegen.kernels import scatter_rows
from graphopt.codegen.kernels.scatter_rows import Write
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, assembly, fenced, match, relax_main

WIDTHS = (1, 3, 7, 8, 9, 31, 64, 65)
DTYPES = ("float32", "float16", "bfloat16", "float64", "int8", "int32", "int64", "uint8", "bool")

WRITES = {
    **{f"add_{w}": Write(5, w, 12, "float32", "add", from_zero=False) for w in WIDTHS},
    **{f"update_{w}": Write(9, w, 5, "float32", "update", from_zero=False) for w in WIDTHS},
    **{f"update_{d}": Write(6, 21, 8, d, "update", from_zero=False) for d in DTYPES},
    **{f"add_{d}": Write(6, 21, 8, d, "add", from_zero=False) for d in DTYPES if d != "bool"},
    **{f"{k}_zero": Write(6, 10, 4, "float32", k, from_zero=True) for k in ("update", "add", "mul", "max", "min")},
    **{k: Write(6, 10, 9, "float32", k, from_zero=False) for k in ("mul", "max", "min")},
    "one_row": Write(1, 33, 40, "float32", "add", from_zero=False),
    "threads_add": Write(40, 600, 90, "float32", "add", from_zero=False),
    "threads_update": Write(90, 777, 40, "float32", "update", from_zero=False),
    "threads_zero": Write(90, 512, 80, "float32", "add", from_zero=True),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library({n: scatter_rows.build(w, HOST) for n, w in WRITES.items()}, tmp_path_factory.mktemp("scatter"))


@pytest.mark.parametrize("name", WRITES)
def test_equals_reference(library, name):
    """Duplicates are applied in order, a bad index is the nearest that exists, and nothing else is touched."""
    w = WRITES[name]
    generator = np.random.default_rng(w.width)
    kind = getattr(ml_dtypes, w.dtype, None) or np.dtype(w.dtype)
    x, source = (generator.integers(0, 2 if w.dtype == "bool" else 9, (n, w.width)) for n in (w.rows, w.count))
    x, source = (np.zeros_like(x) if w.from_zero else x).astype(kind), source.astype(kind)
    if "float" in w.dtype and w.kind == "update":
        source[0, 0] = np.nan
    index = generator.integers(0, w.rows, w.count)
    index[:2] = -(2**40), 2**40
    (y, clean), *fences = (fenced(np.ones_like(x)), fenced(np.zeros(w.rows, "int32")))
    arrays = [*([] if w.from_zero else [x]), index, source]
    given = [fenced(a)[0] for a in arrays]
    library(name, *given, y, *([fences[0][0]] if w.kind == "update" else []))
    want = scatter_rows.reference(x.astype("float64"), index, source.astype("float64"), w.kind)
    np.testing.assert_array_equal(y.astype("float64"), want)
    assert clean()
    assert fences[0][1]()


@pytest.mark.parametrize(("target", "pattern"), [(HOST, "vaddps"), (ARM, "fadd\tv"), (WASM, "f32x4.add")])
def test_rows_are_vectors(target, pattern):
    """Every target adds whole vectors."""
    text = assembly(scatter_rows.build(Write(7, 64, 9, "float32", "add", from_zero=True), target), target)
    assert pattern in text


def scattered(x, shape, count, kind="add"):
    index = relax.Var("index", relax.TensorType((count, shape), "int64"))
    source = relax.Var("source", relax.TensorType((count, 8), "float32"))
    params = [index, source] if not isinstance(x, relax.Var) else [x, index, source]
    return relax_main(lambda b: b.emit(relax.op.scatter_nd(x, index, source, kind)), params)


def test_zeros_are_no_input():
    """Where rows are added to zeros, those are not read; nor taken for zeros where they are negative ones."""
    for sign, inputs in ((1, 2), (-1, 3)):
        zero = relax.const(np.zeros((5, 8), "float32") * sign)
        found = match(scattered(zero, 1, 4), scatter_rows.ScatterRows(), HOST)
        assert isinstance(found, KernelCall)
        assert len(found.inputs) == inputs
        assert found.scratch_bytes == ()


def test_places_of_two_indices_are_declined():
    """What is not one row per index is left to others, with the reason."""
    x = relax.Var("x", relax.TensorType((5, 3, 8), "float32"))
    found = match(scattered(x, 2, 4), scatter_rows.ScatterRows(), HOST)
    assert isinstance(found, Decline)
    assert "places of 2 indices" in found.reason
