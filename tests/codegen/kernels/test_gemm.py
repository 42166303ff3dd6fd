"""Matrix products: every remainder of rows and columns, every tail, batches."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from graphopt.codegen.kernels.epilogue import absorb
from graphopt.codegen.kernels.gemm import Gemm
from graphopt.codegen.kernels.template import KernelCall
from graphopt.codegen.kernels.tile import pack
from graphopt.cost.register_tile import best_tile, registers, tiles
from graphopt.errors import Decline
from tests.codegen.kernels.dense import QUICK, TAILS, check, linear, product
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, aligned, match, relax_main

SIZES = st.tuples(
    st.integers(1, 40), st.integers(1, 70), st.one_of(st.integers(1, 50), st.sampled_from([1, 10, 64, 100])),
    st.sampled_from(sorted(TAILS)),
)  # fmt: skip


@QUICK
@given(st.lists(SIZES, min_size=24, max_size=24))
def test_random_sizes_and_tails(cases):
    """Any sizes with any tail equal PyTorch in float64."""
    check([linear((m, k), n, tail, Gemm(), i) for i, (m, k, n, tail) in enumerate(cases)])


def test_every_remainder():
    """Rows and columns from one below to one above the tile, and one row or column only."""
    rows = [linear((m, 9), 16, "bias", Gemm()) for m in range(1, 14)]
    columns = [linear((7, 5), n, "bias", Gemm()) for n in (*range(1, 20), 31, 33)]
    check(rows + columns)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 13, 24)])
def test_every_tail(shape):
    """Each elementwise tail is taken whole, with leading dimensions in place."""
    check([linear(shape, 20, tail, Gemm()) for tail in TAILS])


def test_long_reductions_in_blocks():
    """Rows are cut into blocks that fit the cache, and the work over threads."""
    cases = [linear((197, 1536), 48, "bias", Gemm()), linear((1, 700), 1000, "bias", Gemm())]
    assert cases[0].call.parameters["block"] < 197
    check(cases)


def test_products_of_run_time_tensors():
    """The second operand is read as it lies, per batch or shared."""
    check(
        [
            product((2, 3, 7, 20), (2, 3, 20, 13), "relu", Gemm()),
            product((5, 33), (33, 40), "residual_relu", Gemm()),
            product((4, 6, 9), (9, 17), "none", Gemm()),
            product((3, 1, 9), (3, 9, 3), "gate", Gemm()),
        ],
    )


def test_equal_layers_share_a_kernel():
    """Equal sizes and tails have equal keys, whatever the weights; another tail has another."""
    first, second = (linear((8, 16), 32, "bias", Gemm(), seed) for seed in (1, 2))
    assert first.call.key == second.call.key
    assert not np.array_equal(first.call.constants[0], second.call.constants[0])
    assert first.call.key != linear((8, 16), 32, "relu", Gemm()).call.key


def test_packed_panels_overlap():
    """The last panel starts where it ends at the last column."""
    weight = np.arange(2 * 20, dtype=np.float32).reshape(2, 20)
    tile = next(t for t in tiles(6, 20, HOST.isa) if t.nr == 16)
    packed = pack(weight, 20, tile)
    assert packed.shape == (2, 2, 16)
    np.testing.assert_array_equal(packed[1, 0], np.arange(4, 20))


def test_integers_are_declined():
    """Only floats; the reason names the types."""
    x = relax.Var("x", relax.TensorType((4, 4), "int32"))
    flow = relax_main(lambda b: b.emit(relax.op.matmul(x, x)), [x])
    declined = match(flow, Gemm())
    assert isinstance(declined, Decline)
    assert "int32" in declined.reason


def test_no_tile_exceeds_the_registers():
    """Accumulators, a row of W and an element of A fit, on every instruction set."""
    for target in (HOST, ARM, WASM):
        for tile in tiles(64, 64, target.isa):
            used = tile.mr * tile.vectors + (tile.vectors if tile.mr > 1 else 0) + 1
            assert used <= registers(target.isa)


def test_rows_share_what_is_loaded():
    """Many rows never get a tile of one row, which would load W once for each; one row gets a wide tile."""
    for target in (HOST, ARM, WASM):
        for m in (49, 128, 196, 3136):
            assert best_tile(m, 512, target.isa).mr >= 3
        assert best_tile(1, 1000, target.isa).vectors >= 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats(dtype):
    """16-bit floats are summed in float32 and rounded once."""
    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    a, w, bias = (rng.standard_normal(s).astype(kind) for s in ((7, 40), (40, 21), (21,)))
    x = relax.Var("x", relax.TensorType(a.shape, dtype))

    def emit(b: relax.BlockBuilder) -> relax.Expr:
        y = b.emit(relax.op.matmul(x, relax.const(w, dtype)))
        return b.emit(relax.op.nn.relu(b.emit(relax.op.add(y, relax.const(bias, dtype)))))

    call = match(relax_main(emit, [x]), Gemm())
    assert isinstance(call, KernelCall)
    out = aligned(np.zeros((7, 21), kind))
    with TemporaryDirectory() as folder:
        Library({"k": call.kernel}, Path(folder))("k", aligned(a), *(aligned(c) for c in call.constants), out)
    expected = np.maximum(a.astype(np.float64) @ w.astype(np.float64) + bias.astype(np.float64), 0)
    bits = {"float16": 11, "bfloat16": 8, "float64": 50}[dtype]
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=2.0 ** -(bits - 1), atol=2.0**-bits)


def test_reference_is_the_kernel():
    """The reference of the template, tail included, is what the kernel computes."""
    case = linear((6, 12), 20, "residual_relu", Gemm())
    after = absorb(case.flow, case.flow.bindings[0].var)
    weight = case.flow.constant(case.flow.bindings[0].value.args[1])
    out = Gemm().reference(case.inputs[0], weight, after.epilogue, [case.inputs[1]])
    np.testing.assert_allclose(out, case.expected, rtol=1e-6, atol=1e-6)
