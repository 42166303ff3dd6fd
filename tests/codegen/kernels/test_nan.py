"""Maxima and minima hand a NaN on, wherever it comes from, and cost no instruction against a constant."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tvm import tirx
from tvm.tirx.script import builder as T

import graphopt
from graphopt.codegen.kernels.emit import load, prim_func, splat, store
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, aligned, assembly

SIZE = 32
CASES = {
    "max": (lambda a, b, c: tirx.max(a, b), np.maximum),
    "min": (lambda a, b, c: tirx.min(a, b), np.minimum),
    "relu": (lambda a, b, c: tirx.max(a, c(0.0)), lambda a, b: np.maximum(a, 0)),
    "clip": (lambda a, b, c: tirx.min(c(0.5), tirx.max(c(-0.5), a)), lambda a, b: np.clip(a, -0.5, 0.5)),
}


def kernel(case, lanes, dtype):
    def body(x, y, z):
        with T.serial(0, SIZE // lanes) as i:
            a, b = load(x, i * lanes, lanes, dtype), load(y, i * lanes, lanes, dtype)
            store(z, i * lanes, CASES[case][0](a, b, lambda v: splat(v, lanes, dtype)), lanes, dtype)

    return prim_func([(name, SIZE, dtype) for name in "xyz"], body)


def test_nan_from_either_side(tmp_path):
    """Vectors and scalars of every float: what numpy computes, which hands NaN on as PyTorch does."""
    types = ("float32", "float64", "float16")
    keys = [(c, n, d) for c in CASES for n in (1, 4) for d in types]
    library = Library({f"{c}_{n}_{d}": kernel(c, n, d) for c, n, d in keys}, tmp_path)
    for case, lanes, dtype in keys:
        x, y = np.random.default_rng(0).normal(size=(2, SIZE)).astype(dtype)
        x[[1, 5, 9]], y[[2, 5, 17]], x[3] = np.nan, np.nan, -np.inf
        z = aligned(np.zeros_like(x))
        library(f"{case}_{lanes}_{dtype}", aligned(x), aligned(y), z)
        np.testing.assert_array_equal(z, CASES[case][1](x, y))


@pytest.mark.parametrize(
    ("target", "wanted", "unwanted"),
    [
        (HOST, r"\tvmaxps\t", r"\tv(cmp|blend|and|or)"),
        (ARM, r"\tfmax\tv", r"\t(fcm|bsl|bif|bit|and\tv)"),
        (WASM, r"f32x4\.lt", r"v128\.bitselect|f32x4\.ne"),
    ],
    ids=["avx2", "neon", "simd128"],
)
def test_a_constant_costs_nothing(target, wanted, unwanted):
    """relu stays what it was: one instruction a vector, on WebAssembly a comparison and a mask."""
    text = assembly(kernel("relu", target.isa.lanes(32), "float32"), target)
    assert len(re.findall(wanted, text)) == SIZE // target.isa.lanes(32)
    assert not re.search(unwanted, text)


class Everything(nn.Module):
    """Every operator that takes a maximum, in one network with several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(9, 16)

    def forward(self, x):
        return (
            *(F.relu(x), F.relu6(x), x.clamp(-1, 1), F.leaky_relu(x, 0.1), F.hardswish(x)),
            *(x.max(), x.amax((1, 3)), x.amin(2), x.max(3).values, x.amax(0), x.bfloat16().amax(1).float()),
            *(F.max_pool2d(x, 3, 2, 1), F.max_pool1d(x[0], 2), torch.maximum(x, x.flip(0))),
            *(F.relu(self.conv(x)), F.relu6(self.conv(x)), F.relu(self.one(x))),
            *(x.softmax(-1), x.log_softmax(-1), F.scaled_dot_product_attention(x, x, x)),
        )


def test_nan_reaches_every_output():
    """A NaN in the input is in the outputs where PyTorch has it, and nowhere else."""
    torch.manual_seed(0)
    module, x = Everything().eval(), torch.randn(2, 4, 8, 9)
    x[0, 1, 2, 3] = x[1, 2, 5, 8] = x[1, 0, 0, 0] = torch.nan
    # PyTorch's fused attention gives zeros for rows with NaN where it has AVX-512, and NaN elsewhere.
    with sdpa_kernel(SDPBackend.MATH), graphopt.compile(module, example_inputs=(x,)) as bundle:
        for ours, theirs in zip(bundle(x).values(), module(x), strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-2, atol=1e-5, equal_nan=True)
