"""What token reduction adds to programs equals PyTorch on every target, whatever the sizes."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphopt
from graphopt.codegen.lower import compile_program
from graphopt.targets import resolve, run_qemu
from tests.codegen.kernels.dense import QUICK
from tests.codegen.token_forms import Sizes, Tokens, data

SIZES = st.builds(
    lambda b, n, c, kept, merged: Sizes(b, n, c, max(1, int(kept * n)), max(1, int(merged * n))),
    st.integers(1, 4), st.integers(8, 150), st.integers(1, 70), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip


def check(sizes: Sizes, spec: str) -> None:
    inputs = data(sizes)
    expected = Tokens()(**inputs)
    with graphopt.compile(Tokens(), example_inputs=inputs, target=spec) as bundle:
        results = list(bundle.run(inputs).values())
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-6)


@QUICK
@given(SIZES)
def test_random_sizes(sizes):
    """Ties and duplicates as PyTorch has them: values are small integers, so the comparison is exact but for means."""
    check(sizes, "cpu")


@pytest.mark.parametrize("spec", ["cpu:x86-64-v3", "wasm", "arm"])
@pytest.mark.parametrize("b", [1, 3])
def test_every_target(spec, b):
    """Odd sizes, one sample and several."""
    if spec == "arm" and not shutil.which(run_qemu.QEMU):
        pytest.skip("no emulator")
    check(Sizes(b, 77, 37, 40, 31), spec)


@pytest.mark.parametrize("spec", ["cpu", "wasm", "arm"])
def test_every_form_has_a_kernel(spec):
    """No sort, top-k, maximum or scatter of rows is left to generic loops, and no index is written out by channels."""
    names = ("gather", "scatter_add", "scatter back", "most similar", "greatest", "argsort", "class attention")
    program = graphopt.capture(Tokens(names), data(Sizes(2, 77, 37, 40, 31)))
    kernels = compile_program(program, resolve(spec)).kernels
    ours = [k.template for k in kernels]
    for template, count in {"scatter-rows": 2, "similarity": 1, "row-max": 1, "sorting": 1, "row-dots": 1}.items():
        assert ours.count(template) == count
    generic = " ".join(k.where for k in kernels if k.template == "tvm")
    assert not any(word in generic for word in ("sort", "topk", "scatter", "gather", "matmul"))
