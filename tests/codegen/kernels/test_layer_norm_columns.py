"""Layer norm where tokens are columns: any numbers of features and tokens, with and without scale and offset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from graphopt.codegen.kernels import layer_norm_columns
from graphopt.codegen.kernels.layer_norm_columns import LayerNormColumns
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from graphopt.targets.target import AVX512, SIMD128, Target
from tests.codegen.kernels.dense import QUICK
from tests.codegen.kernels.harness import HOST, Library, fenced, match, relax_main

TARGETS = (HOST, replace(HOST, isa=SIMD128), replace(HOST, isa=AVX512))


def call_of(
    shape: tuple[int, ...], scale: bool, center: bool, target: Target = HOST, axis: int = -2, dtype: str = "float32"
) -> KernelCall | Decline:
    """A layer norm over `axis` with gamma = 1, 2, .. and beta = -1, -2, .."""
    x = relax.Var("x", relax.TensorType(shape, dtype))
    gamma = np.arange(1, shape[axis] + 1).astype(dtype)

    def norm(b):
        weights = relax.const(gamma), relax.const(-gamma)
        return b.emit(relax.op.nn.layer_norm(x, *weights, axes=[axis], epsilon=1e-5, scale=scale, center=center))

    return match(relax_main(norm, [x]), LayerNormColumns(), target)


SIZES = st.tuples(
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.just(384)),
    st.one_of(st.integers(1, 70), st.sampled_from([1, 8, 31, 32, 33, 196, 197])),
)


@pytest.mark.parametrize("parallel", [True, False], ids=["threads", "one thread"])
@settings(QUICK, max_examples=2)
@given(st.lists(st.tuples(SIZES, st.booleans(), st.booleans(), st.sampled_from(TARGETS)), min_size=12, max_size=12))
def test_any_size(parallel, cases):
    """Any sizes equal PyTorch in float64, with one feature and one token too, far from zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_norm_columns, "PARALLEL_ELEMENTS", 1 if parallel else 1 << 60)
        calls = [call_of(*case) for case in cases]
    assert all(isinstance(call, KernelCall) for call in calls), calls
    with TemporaryDirectory() as folder:
        library = Library({f"k{n}": call.kernel for n, call in enumerate(calls)}, Path(folder))
    for n, (call, (shape, scale, center, _)) in enumerate(zip(calls, cases, strict=True)):
        x, _ = fenced((np.random.default_rng(n).normal(size=shape) + 3).astype(np.float32))
        y, intact = fenced(np.full(shape, np.nan, np.float32))
        library(f"k{n}", x, *(fenced(c)[0] for c in call.constants), y)
        assert intact()
        gamma = torch.arange(1, shape[1] + 1).double()
        wanted = torch.nn.functional.layer_norm(
            torch.from_numpy(x).double().mT,
            (shape[1],),
            gamma if scale else None,
            -gamma if center else None,
        )
        size = shape[1] if scale or center else 1
        np.testing.assert_allclose(y, wanted.mT.numpy(), atol=1e-5 * size, rtol=2e-5, err_msg=str(cases[n]))
        known = LayerNormColumns().reference(
            x.astype(float), gamma.numpy() if scale else None, -gamma.numpy() if center else None, 1e-5
        )
        np.testing.assert_allclose(known, wanted.mT.numpy(), atol=1e-9)


def test_weights_that_are_not_used_are_not_passed():
    """One constant for a norm without offset, none for one without both."""
    assert [len(call_of((8, 9), *used).constants) for used in ((True, True), (True, False), (False, False))] == [
        2,
        1,
        0,
    ]
    np.testing.assert_array_equal(call_of((3, 9), False, True).constants[0], [-1, -2, -3])


@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "reason"),
    [
        ((4, 8), -1, "float32", "axes"),
        ((2, 4, 8), 0, "float32", "axes"),
        ((8,), -1, "float32", "axes"),
        ((4, 8), -2, "float16", "float16"),
        ((4, 0), -2, "float32", "axes"),
    ],
)
def test_others_are_declined(shape, axis, dtype, reason):
    """Features that stand last or first of three, other types, nothing to norm."""
    declined = call_of(shape, True, True, axis=axis, dtype=dtype)
    assert isinstance(declined, Decline)
    assert reason in declined.reason


def test_run_time_weights_are_declined():
    """gamma and beta that are inputs are left to others."""
    x, w = (relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in (("x", (4, 9)), ("w", (4,))))
    declined = match(
        relax_main(lambda b: b.emit(relax.op.nn.layer_norm(x, w, w, axes=[-2])), [x, w]), LayerNormColumns()
    )
    assert isinstance(declined, Decline)
    assert "run time" in declined.reason
