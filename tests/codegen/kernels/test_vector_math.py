"""Transcendental functions: their error over the whole range, and that no call is left."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from graphopt.codegen.kernels.emit import load, prim_func, store
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, aligned, assembly

SIZE = 1 << 16
TINY = 1.1754943508222875e-38

# Function, reference in float64, most units in the last place.
FUNCTIONS = {
    "exp": (tirx.exp, np.exp, 2),
    "exp2": (tirx.exp2, np.exp2, 2),
    "exp10": (tirx.exp10, lambda x: np.power(10.0, x), 2),
    "log": (tirx.log, np.log, 2),
    "log2": (tirx.log2, np.log2, 2),
    "log10": (tirx.log10, np.log10, 2),
    "log1p": (tirx.log1p, np.log1p, 3),
    "erf": (tirx.erf, lambda x: torch.erf(torch.from_numpy(x)).numpy(), 5),
    "tanh": (tirx.tanh, np.tanh, 3),
    "sigmoid": (tirx.sigmoid, lambda x: 1 / (1 + np.exp(-x)), 3),
    "rsqrt": (tirx.rsqrt, lambda x: 1 / np.sqrt(x), 2),
    "sin": (tirx.sin, np.sin, 2),
    "cos": (tirx.cos, np.cos, 2),
}
POWERS = (2.0, 3.0, -1.0, 0.5, 2.5, 1.7, -2.3, 33.0)


def over(function, lanes=8, size=SIZE, dtype="float32"):
    def body(x, y):
        with T.serial(0, size // lanes) as i:
            store(y, i * lanes, function(load(x, i * lanes, lanes, dtype)), lanes, dtype)

    return prim_func([("x", size, dtype), ("y", size, dtype)], body)


def power(exponent):
    return lambda x: tirx.pow(x, tirx.const(exponent, x.ty.dtype))


def samples() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 1 << 32, SIZE, dtype=np.uint64).astype(np.uint32).view(np.float32).copy()
    x[: SIZE // 2] = rng.uniform(-100, 100, SIZE // 2)
    x[: SIZE // 4] = rng.normal(size=SIZE // 4)
    edges = [0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 88.7228, 88.73, -87.33, -87.34, 3.4e38, -3.4e38, 128, -126, -1.5]
    x[: len(edges)] = edges
    x[np.abs(x) < TINY] = 0  # denormals are flushed, which the module says
    return x


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    kernels = {name: over(f) for name, (f, _, _) in FUNCTIONS.items()}
    kernels |= {f"scalar_{name}": over(f, lanes=1, size=64) for name, (f, _, _) in FUNCTIONS.items()}
    kernels |= {f"pow{i}": over(power(p)) for i, p in enumerate(POWERS)}
    kernels["half"] = over(tirx.exp, size=64, dtype="float16")
    return Library(kernels, tmp_path_factory.mktemp("vector_math"))


def run(library, name, x):
    x, y = aligned(x), aligned(np.zeros_like(x))
    library(name, x, y)
    return y


def check(x, y, expected, ulps):
    """Within `ulps` where the result is a normal float32, equal where it is not, zero where it is too small."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = expected.astype(np.float32)
    normal = np.isfinite(rounded) & (np.abs(expected) >= TINY)
    error = np.abs(y[normal] - expected[normal]) / np.spacing(np.abs(rounded[normal])).astype(float)
    worst = np.argmax(error - np.broadcast_to(ulps, x.shape)[normal])
    bound = np.broadcast_to(ulps, x.shape)[normal][worst]
    assert error[worst] <= bound, f"{error[worst]:.2f} ulp at {x[normal][worst]}"
    small = ~normal & np.isfinite(rounded)
    assert (np.abs(y[small]) < TINY).all()
    rest = ~normal & ~small
    np.testing.assert_array_equal(y[rest], rounded[rest])


@pytest.mark.parametrize("name", FUNCTIONS)
@np.errstate(all="ignore")
def test_error_is_bounded_over_the_whole_range(vectors, name):
    """Every function is within its bound, and right for zeros, infinities, NaN and arguments that overflow."""
    _, reference, ulps = FUNCTIONS[name]
    x = samples()
    if name in ("sin", "cos"):
        x[(np.abs(x) > 1e5) & np.isfinite(x)] = 0
    check(x, run(vectors, name, x), reference(x.astype(float)), ulps)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scalars_are_computed_as_vectors_are(vectors, name):
    """One element at a time gives the same, to the rounding of fused operations."""
    x = np.linspace(0.1, 5, 64).astype(np.float32)
    _, reference, ulps = FUNCTIONS[name]
    check(x, run(vectors, f"scalar_{name}", x), reference(x.astype(float)), ulps)


@pytest.mark.parametrize("i", range(len(POWERS)))
@np.errstate(all="ignore")
def test_constant_powers(vectors, i):
    """Products and roots are within 4 ulp, other exponents within the bound that grows with the result's exponent."""
    x, exponent = samples(), POWERS[i]
    if exponent % 1 == 0.5:
        x[np.isneginf(x)] = 1  # a square root, as PyTorch has it: NaN there
    expected = np.power(x.astype(float), exponent)
    direct = (2 * exponent).is_integer() and abs(exponent) <= 16
    size = np.abs(exponent * np.log2(np.where(x == 0, 1, np.abs(x.astype(float)))))
    grown = np.where(np.isfinite(size), 2 * (2 + size), 4)
    check(x, run(vectors, f"pow{i}", x), expected, np.full(x.shape, 5.0) if direct else grown)


def test_half_is_computed_in_float32(vectors):
    """float16 in and out is right to its own last place."""
    x = np.linspace(-4, 4, 64).astype(np.float16)
    np.testing.assert_allclose(run(vectors, "half", x), np.exp(x.astype(float)), rtol=2**-10)


@pytest.mark.parametrize("target", [HOST, ARM, WASM], ids=lambda t: t.isa.name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_call_is_left(target, name):
    """Vector code on every processor: nothing of libm is called."""
    text = assembly(over(FUNCTIONS[name][0], lanes=target.isa.lanes(32), size=64), target)
    called = re.findall(r"^\s+(?:callq?|bl|call)\s+(\S+)", text, re.M)
    assert [c for c in called if not c.startswith(("TVM", "__stack"))] == []


def test_what_is_unsafe_to_read_is_not_read_early(tmp_path):
    """A function behind a condition does not move the read of its argument in front of it."""
    far = 1 << 28  # elements: the address is not mapped

    def body(x, y):
        with T.serial(0, 64) as i:
            guarded = tirx.if_then_else(i < 1, tirx.exp(x[i * far]), tirx.const(0.0, "float32"))
            T.buffer_store(y, guarded, [i])

    library = Library({"far": prim_func([("x", 1, "float32"), ("y", 64, "float32")], body)}, tmp_path)
    y = aligned(np.ones(64, np.float32))
    library("far", aligned(np.zeros(1, np.float32)), y)
    assert y.tolist() == [1.0] + [0.0] * 63
