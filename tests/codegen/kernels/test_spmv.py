"""One vector times a matrix with zeros: every format, size and tail, in tasks or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.codegen.kernels import spmv
from graphopt.codegen.kernels.epilogue import absorb
from graphopt.codegen.kernels.spmv import SparseVector, height_of
from graphopt.targets.target import AVX512, NEON, SIMD128
from tests.codegen.kernels.channels_first import FORMATS, ROWS, TAILS, convolution, linear, mask, turned
from tests.codegen.kernels.dense import QUICK, Shape, check
from tests.codegen.kernels.harness import HOST

TARGETS = (HOST, *(replace(HOST, isa=isa) for isa in (SIMD128, NEON, AVX512)))
SIZES = st.tuples(
    st.one_of(st.sampled_from([1, 3, 5, 7, 8, 10, 16]), st.integers(1, 70)),
    st.integers(1, 90),
    st.sampled_from(sorted(TAILS)),
    st.fixed_dictionaries(
        {
            "word": st.sampled_from(FORMATS),
            "keep": st.sampled_from([0.05, 0.3, 0.7]),
            "rows": st.sampled_from(ROWS),
            "target": st.sampled_from(TARGETS),
        }
    ),
    st.sampled_from([0, 1, 2]),
)


@pytest.mark.parametrize("parallel", [True, False], ids=["threads", "one thread"])
@settings(QUICK, max_examples=2)
@given(st.lists(SIZES, min_size=16, max_size=16))
def test_random_products(parallel, cases):
    """Linear layers of one token and convolutions of one pixel, in groups too, equal PyTorch in float64."""
    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spmv, "FLOPS_PER_TASK", 1 if parallel else 1 << 60)
        for i, (outputs, inputs, tail, weight, groups) in enumerate(cases):
            if groups:
                shape = Shape((1, 1), groups * inputs, groups * outputs, (1, 1), groups=groups)
                built.append(convolution(shape, tail, SparseVector(), **weight, seed=i))
            else:
                built.append(linear(outputs, inputs, 1, tail, SparseVector(), **weight, seed=i))
    check(built)


def test_leading_dimensions_of_one():
    """[1, 1, inputs, 1] is a vector."""
    rng = np.random.default_rng(0)
    weight = np.where(rng.random((12, 9)) < 0.4, rng.standard_normal((12, 9)), 0).astype(np.float32)
    check(
        [turned(lambda _: weight, tokens, "bias_residual_relu", SparseVector()) for tokens in ((1,), (1, 1), (1, 1, 1))]
    )


@pytest.mark.parametrize(
    "shape", [Shape((1, 2), 4, 4, (1, 1)), Shape((1, 1), 4, 4, (1, 1), batch=2), Shape((3, 3), 4, 4)], ids=str
)
def test_more_than_one_pixel_is_left_to_others(shape):
    """Rows of pixels, several images and larger kernels have another template."""
    with pytest.raises(AssertionError, match="more than one pixel"):
        convolution(shape, "none", SparseVector())


def test_the_format_decides_the_height():
    """Blocks are multiplied as such, and single elements not by all the zeros beside them."""
    rng = np.random.default_rng(0)
    heights = {
        word: height_of(mask(rng, 256, 512, word, 0.1, "as they are").astype(np.float32), HOST)[0]
        for word in ("unstructured", "4x1", "8x1", "dense")
    }
    assert heights.pop("unstructured") <= 4
    assert heights == {"4x1": 4, "8x1": 8, "dense": 8}


def test_reference_is_the_kernel():
    """The reference of the template, tail included, is what the kernel must compute."""
    case = linear(6, 12, 1, "bias_residual_relu", SparseVector())
    after = absorb(case.flow, case.flow.bindings[0].var, 2)
    matrix = case.flow.constant(case.flow.bindings[0].value.args[0])
    operands = [case.call.constants[-1], case.inputs[1]]
    out = SparseVector().reference(matrix, case.inputs[0][:, 0], after.epilogue, operands)
    np.testing.assert_allclose(out.reshape(case.expected.shape), case.expected, rtol=1e-6, atol=1e-6)
