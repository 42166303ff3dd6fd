"""float16 in integer arithmetic: exact conversions, arithmetic rounded once, and no call for any of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tvm import tirx
from tvm.tirx.script import builder as T

from graphopt import targets
from graphopt.codegen.kernels.emit import load, prim_func, store
from graphopt.codegen.kernels.soft_half import converts_natively
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, aligned, assembly

SIZE = 1 << 16


def convert(source, result, lanes=8, size=SIZE, function=lambda x: x):
    """result[i] = function(source[i]) in the wider of both types."""

    def body(x, y):
        with T.serial(0, size // lanes) as i:
            store(y, i * lanes, function(load(x, i * lanes, lanes, source)), lanes, source)

    return prim_func([("x", size, source), ("y", size, result)], body)


def guarded():
    """float16 behind a condition on its index: 3 elements, of which only the first two may be read."""

    def body(x, y):
        with T.serial(0, 3) as i:
            value = tirx.if_then_else(
                i < 2, load(x, i, 1, "float16") * tirx.const(2, "float16"), tirx.const(7, "float16")
            )
            store(y, i, value, 1, "float16")

    return prim_func([("x", 2, "float16"), ("y", 3, "float16")], body)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    assert not converts_natively(HOST)
    kernels = {
        "widen": convert("float16", "float32"),
        "widen_scalar": convert("float16", "float32", lanes=1),
        "narrow": convert("float32", "float16"),
        "narrow_scalar": convert("float32", "float16", lanes=1),
        "chain": convert("float16", "float16", function=lambda x: (x * x + x) / (x - tirx.const(1.5, x.ty.dtype))),
        "guarded": guarded(),
    }
    return Library(kernels, tmp_path_factory.mktemp("soft_half"))


def run(library, name, x, result):
    x, y = aligned(x), aligned(np.zeros(x.shape, result))
    library(name, x, y)
    return y


def all_halves() -> np.ndarray:
    return np.arange(SIZE, dtype=np.uint16).view(np.float16)


def same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to the bit, zeros' signs too; a NaN may be any."""
    missing = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(got), missing)
    kind = f"u{got.itemsize}"
    np.testing.assert_array_equal(got.view(kind)[~missing], wanted.view(kind)[~missing])


@pytest.mark.parametrize("name", ["widen", "widen_scalar"])
def test_every_half_is_widened_exactly(library, name):
    """All 65536: normal and subnormal numbers, zeros, infinities, NaN."""
    same_bits(run(library, name, all_halves(), np.float32), all_halves().astype(np.float32))


def floats(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "random bits":
        return rng.integers(0, 1 << 32, SIZE, dtype=np.uint64).astype(np.uint32).view(np.float32)
    if kind == "in range":
        return (rng.normal(size=SIZE) * 2.0 ** rng.integers(-26, 17, SIZE)).astype(np.float32)
    # Halfway between neighbours, where the even one wins, and the floats next to that; 65520 is the least infinity.
    halves = np.arange(SIZE // 2, dtype=np.uint16)[:0x7C00].view(np.float16).astype(np.float32)
    ties = (halves + np.append(halves[1:], np.float32(65536))) / 2
    picked = np.concatenate([ties, -ties])[:SIZE]
    picked = np.concatenate([picked, np.full(SIZE - picked.size, 65520, np.float32)])
    toward = {"ties": picked, "above ties": np.float32(np.inf), "below ties": np.float32(-np.inf)}[kind]
    return np.nextafter(picked, toward)


@pytest.mark.parametrize("name", ["narrow", "narrow_scalar"])
@pytest.mark.parametrize("kind", ["random bits", "in range", "ties", "above ties", "below ties"])
@np.errstate(all="ignore")
def test_floats_are_rounded_to_the_nearest_even_half(library, name, kind):
    """As IEEE 754 has it, with subnormal results, overflow to infinity, and NaN."""
    x = floats(kind)
    same_bits(run(library, name, x, np.float16), x.astype(np.float16))


@np.errstate(all="ignore")
def test_each_operation_is_rounded(library):
    """Arithmetic in float16 rounds after every step, as processors do that convert natively."""
    x = all_halves()
    same_bits(run(library, "chain", x, np.float16), (x * x + x) / (x - np.float16(1.5)))


def test_what_must_not_be_read_is_not_read_early(library):
    """The conversion of an element behind a condition stays behind it."""
    x, y = aligned(np.array([1.5, -3], np.float16)), aligned(np.zeros(3, np.float16))
    library("guarded", x, y)
    np.testing.assert_array_equal(y, np.array([3, -6, 7], np.float16))


@pytest.mark.parametrize("target", [HOST, ARM, WASM], ids=lambda t: t.isa.name)
def test_no_call_is_left(target):
    """Neither instructions' stand-ins of the compiler's library, nor anything else, is called."""
    for source, result in (("float16", "float32"), ("float32", "float16"), ("float16", "float16")):
        text = assembly(convert(source, result, size=64, function=lambda x: x + x), target)
        called = re.findall(r"^\s+(?:callq?|bl|call)\s+(\S+)", text, re.M)
        assert [c for c in called if not c.startswith(("TVM", "__stack"))] == []


def test_native_conversions_are_kept():
    """x86 from level 3 on and Arm convert by instructions of their own."""
    native = {
        name: converts_natively(targets.resolve(name)) for name in ("cpu:haswell", "arm", "cpu:x86-64-v2", "wasm")
    }
    assert native == {"cpu:haswell": True, "arm": True, "cpu:x86-64-v2": False, "wasm": False}
