"""Few rows times a transposed matrix: sizes around the squares, views, shared keys, epilogues; what is matched."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from graphopt.codegen.kernels.row_dots import RowDots
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, aligned, assembly, fenced, match, relax_main

# lead, m, n, k
SIZES = {
    "head": ((1, 6), 1, 197, 64),
    "exact": ((3,), 2, 8, 8),
    "overlap": ((2, 2), 4, 9, 12),
    "narrow": ((), 1, 4, 20),
    "threads": ((2, 4), 1, 600, 80),
}


def product(lead, m, n, k):
    """q (*lead, m, k) and keys as they lie in tokens: (*lead[:-1], n, lead[-1], k)."""
    heads = lead[-1:] or (1,)
    q = relax.Var("q", relax.TensorType((*lead, m, k), "float32"))
    x = relax.Var("x", relax.TensorType((*lead[:-1], n, *heads, k), "float32"))

    def build(b):
        rank = len(lead)
        if rank:
            keys = b.emit(relax.op.permute_dims(x, [*range(rank - 1), rank, rank + 1, rank - 1]))
        else:
            keys = b.emit(relax.op.permute_dims(b.emit(relax.op.reshape(x, (n, k))), [1, 0]))
        return b.emit(relax.op.multiply(b.emit(relax.op.matmul(q, keys)), relax.const(0.5, "float32")))

    return relax_main(build, [q, x])


def call_of(sizes, target=HOST) -> KernelCall:
    call = match(product(*sizes), RowDots(), target)
    assert isinstance(call, KernelCall)
    return call


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library({n: call_of(s).kernel for n, s in SIZES.items()}, tmp_path_factory.mktemp("row_dots"))


@pytest.mark.parametrize("name", SIZES)
def test_keys_are_read_where_they_lie(library, name):
    """Heads inside of tokens are read in place; the scale is applied in the kernel."""
    lead, m, n, k = SIZES[name]
    generator = np.random.default_rng(n)
    q = generator.standard_normal((*lead, m, k), "float32")
    x = generator.standard_normal((*lead[:-1], n, *(lead[-1:] or (1,)), k), "float32")
    (c, clean) = fenced(np.zeros((*lead, m, n), "float32"))
    library(name, aligned(q), aligned(x), c)
    keys = np.moveaxis(x, len(lead[:-1]), -1) if lead else x[:, 0].T
    np.testing.assert_allclose(c, 0.5 * (q.astype("float64") @ keys), rtol=1e-5, atol=1e-5)
    assert clean()


@pytest.mark.parametrize(("target", "fused"), [(HOST, "vfmadd"), (ARM, "fmla"), (WASM, "f32x4.mul")])
def test_products_are_vectors(target, fused):
    """Every target multiplies vectors along the row."""
    text = assembly(call_of(((1, 2), 1, 32, 64), target).kernel, target)
    assert text.count(fused) >= call_of(((1, 2), 1, 32, 64), target).parameters["lanes"]


def test_other_products_are_declined():
    """Many rows, a matrix that lies as it is multiplied, constants and short rows are left to others."""

    def plain(q_shape, b_shape, constant=False):
        q = relax.Var("q", relax.TensorType(q_shape, "float32"))
        b = relax.Var("b", relax.TensorType(b_shape, "float32"))
        keys = relax.const(np.zeros(b_shape, "float32")) if constant else b
        flow = relax_main(lambda bb: bb.emit(relax.op.matmul(q, keys)), [q] if constant else [q, b])
        return match(flow, RowDots(), HOST)

    for found in (plain((9, 8), (8, 20)), plain((1, 8), (8, 20)), plain((1, 8), (8, 20), constant=True)):
        assert isinstance(found, Decline)
    assert isinstance(match(product((2,), 1, 30, 7), RowDots(), HOST), Decline)
